"""A chat in the terminal, or in a pipe: one line is one question, answers come as they are made.

Ctrl-C stops an answer, not the program; Ctrl-D ends it. In a pipe only answers are written, and an
empty line for an empty one, so that answers and questions stay in step.
"""

from collections.abc import Callable
from typing import TextIO

from ptuning.serve.answer import Answer
from ptuning.serve.session import BASE_NAME, SamplingOptions, UnknownPrefixError
from ptuning.serve.session_local import Session

HELP = """\
/prefix NAME   answer with this prefix; without a name, list them
/base          answer with the untouched base
/clear         forget the conversation
/help          show this
/quit          end (so does Ctrl-D); Ctrl-C stops an answer"""


class TerminalChat:
    """A conversation between two text streams."""

    def __init__(
        self,
        session: Session,
        *,
        prefix: str | None,
        sampling: SamplingOptions,
        read_line: Callable[[str], str],
        output: TextIO,
        notices: TextIO,
        is_terminal: bool,
    ) -> None:
        """Read lines with read_line(prompt), which raises EOFError at the end; write to output.

        Everything that is not an answer goes to notices, and in a pipe only what went wrong.
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
        self._say(f"Answering with {self._speaker}. /help lists the commands.")
        while True:
            try:
                line = self._read_line(f"{self._speaker}> " if self._is_terminal else "").strip()
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit ends the chat.")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)
            elif not self._is_terminal:
                self._end_line()

    @property
    def _speaker(self) -> str:
        return self.prefix or BASE_NAME

    def _obey(self, line: str) -> None:
        command, _, name = line.partition(" ")
        if command == "/base":
            self._switch(None)
        elif command == "/prefix" and name.strip():
            self._switch(name.strip())
        elif command == "/prefix":
            self._say("\n".join([*self.session.prefixes, BASE_NAME]))
        elif command == "/clear":
            self.history.clear()
            self._say("The conversation is forgotten.")
        elif command == "/help":
            self._say(HELP)
        else:
            self._complain(f"There is no command {command}; /help lists them.")

    def _switch(self, name: str | None) -> None:
        try:
            if name not in (None, BASE_NAME):
                self.session.find_prefix(str(name))
        except UnknownPrefixError as error:
            self._complain(str(error))
            return
        self.prefix = None if name == BASE_NAME else name
        self._say(f"Answering with {self._speaker}.")

    def _answer(self, question: str) -> None:
        with self.session.chat(question, self.history, self.prefix, **self.sampling) as answer:
            if answer.notice is not None:
                self._complain(f"[{answer.notice}]")
            self._write(answer)
        self._end_line()
        self.history.append((question, answer.text))

    def _end_line(self) -> None:
        self._output.write("\n")
        self._output.flush()

    def _write(self, answer: Answer) -> None:
        """Write pieces as they come; Ctrl-C keeps what was written."""
        try:
            for piece in answer:
                self._output.write(piece)
                self._output.flush()
        except KeyboardInterrupt:
            answer.close()
            self._complain(" [stopped]")

    def _say(self, text: str) -> None:
        if self._is_terminal:
            self._complain(text)

    def _complain(self, text: str) -> None:
        self._notices.write(f"{text}\n")
        self._notices.flush()
