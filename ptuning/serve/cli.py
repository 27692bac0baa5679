"""A chat in the terminal, or in a pipe: every line is a question, answers are written as generated.

Ctrl-C stops an answer, not the program; Ctrl-D ends it. In a pipe only answers are written, and an
empty line for an empty question, so that lines of input and output correspond.
"""

from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ptuning.serve.session import BASE_NAME, AbstractSession, UnknownPrefixError
from ptuning.serve.text_stream import Answer

HELP = """\
/prefix NAME   answer with this prefix; without a name, list them
/base          answer with the untouched base
/clear         start a new conversation
/help          show this list
/quit          end the chat, as does Ctrl-D; Ctrl-C stops an answer"""


class TerminalChat:
    """A conversation between two text streams."""

    def __init__(
        self,
        session: AbstractSession,
        *,
        prefix: str | None,
        sampling: Mapping[str, Any],
        read_line: Callable[[str], str],
        output: TextIO,
        notices: TextIO,
        is_terminal: bool,
    ) -> None:
        """Read lines with read_line(prompt), which raises EOFError at the end.

        Answers go to output, everything else to notices; in a pipe, only warnings go there.
        """
        self.session = session
        self.prefix = prefix
        self.sampling = sampling
        self.history: list[tuple[str, str]] = []
        self._read_line = read_line
        self._output = output
        self._notices = notices
        self._is_terminal = is_terminal

    def run(self) -> None:
        """Answer until the end of the input or /quit."""
        self._inform(f"Answering with {self._speaker}. /help lists the commands.")
        while True:
            try:
                line = self._read_line(f"{self._speaker}> " if self._is_terminal else "").strip()
            except EOFError:
                self._inform("")
                return
            except KeyboardInterrupt:
                self._inform("\nCtrl-D or /quit ends the chat.")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self._run_command(line)
            elif line:
                self._answer(line)
            elif not self._is_terminal:
                self._end_line()

    @property
    def _speaker(self) -> str:
        return self.prefix or BASE_NAME

    def _run_command(self, line: str) -> None:
        command, _, name = line.partition(" ")
        if command == "/base":
            self._switch(BASE_NAME)
        elif command == "/prefix" and name.strip():
            self._switch(name.strip())
        elif command == "/prefix":
            self._inform("\n".join([*self.session.prefixes, BASE_NAME]))
        elif command == "/clear":
            self.history.clear()
            self._inform("This is a new conversation.")
        elif command == "/help":
            self._inform(HELP)
        else:
            self._warn(f"There is no command {command}; /help lists them.")

    def _switch(self, name: str) -> None:
        try:
            self.prefix = None if name == BASE_NAME else self.session.find_prefix(name).name
        except UnknownPrefixError as error:
            self._warn(str(error))
        else:
            self._inform(f"Answering with {self._speaker}.")

    def _answer(self, question: str) -> None:
        with self.session.chat(question, self.history, self.prefix, **self.sampling) as answer:
            if answer.notice is not None:
                self._warn(f"[{answer.notice}]")
            self._write(answer)
        self._end_line()
        self.history.append((question, answer.text))

    def _end_line(self) -> None:
        self._output.write("\n")
        self._output.flush()

    def _write(self, answer: Answer) -> None:
        """Write pieces as they arrive; Ctrl-C keeps what was written."""
        try:
            for piece in answer:
                self._output.write(piece)
                self._output.flush()
        except KeyboardInterrupt:
            answer.close()
            self._warn(" [stopped]")

    def _inform(self, text: str) -> None:
        if self._is_terminal:
            self._warn(text)

    def _warn(self, text: str) -> None:
        self._notices.write(f"{text}\n")
        self._notices.flush()
