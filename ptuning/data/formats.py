"""Step 2 of 5: rows of any known format to prompts, answers and earlier turns.

A layout says what the columns mean. It is found once per file, by the column names and the first
conversation, unless columns are named. A conversation becomes one row per answer.
Formats: two columns such as ADGEN's; Alpaca, https://github.com/tatsu-lab/stanford_alpaca; ShareGPT
and OpenAI messages, https://github.com/hiyouga/LlamaFactory/tree/main/data; LIMA,
https://huggingface.co/datasets/GAIR/lima; rows of `history` alone.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ptuning.data.parsing import (
    CONVERSATION_NAMES,
    DIALOGUE_NAMES,
    HISTORY,
    INPUT_NAMES,
    INSTRUCTION_NAMES,
    LIMA_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    SYSTEM,
    TOOLS,
    kind_of,
    parse_json,
    write_json,
)
from ptuning.data.prompts import RowFormat, TextRow, Turns
from ptuning.data.raw_file import DataError, RawRow

PAIRS = (("content", "summary"), ("prompt", "response"))  # ADGEN and the row contract come first
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "observation", "tool"), "user"),
    **dict.fromkeys(("function", "function_response"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call",), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_ROLE_KEYS, _TEXT_KEYS = ("from", "role", "speaker"), ("value", "content", "text")
_WEIGHT_KEYS = ("loss_weight", "weight")
_CALLS = "tool_calls"
_LIST_TEXT = re.compile(r"\s*\[\s*(\]\s*$|[\[{\"'])")
# Question and answer in one object
_PAIR_KEYS = (
    *(("q", "a"), ("question", "answer"), ("human", "assistant"), ("user", "assistant")),
    *(("input", "output"), ("prompt", "response")),
)
# Everything that is read in a turn, or that only names the speaker
TURN_KEYS = {
    *(*_ROLE_KEYS, *_TEXT_KEYS, *_WEIGHT_KEYS, _CALLS, "tool_call_id", "name", "id"),
    *(key for pair in _PAIR_KEYS for key in pair),
}
History = tuple[tuple[str, str], ...]  # earlier questions and answers


class UnknownColumns(DataError):
    """A named column that is missing, or columns whose meaning is unknown."""


class NoAnswers(UnknownColumns):
    """Prompts without a column of answers."""


@dataclass(frozen=True)
class Layout:
    """What the columns of a file mean; None: there is no such column."""

    name: str  # a FormatName other than "auto"
    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None  # what a conversation may call; appended to the system text
    conversation: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns that are used, by what they mean."""
        return {
            role: name for role, name in vars(self).items() if role != "name" and name is not None
        }

    def __str__(self) -> str:
        """Say what is made of which column."""
        turns = None if self.conversation is None else f"the turns of {self.conversation}"
        parts = (self.system, self.tools, self.history, self.prompt, self.input, turns)
        prompt = " + ".join(name for name in parts if name is not None)
        answers = "" if turns is not None else f" -> {self.response or '(no answers)'}"
        return f"{self.name}: {prompt}{answers}"

    def lack(self, row: TextRow) -> str | None:
        """Say why training drops a row; None if it does not."""
        if row.skipped is not None:
            return row.skipped
        if not row.prompt.strip():
            column, missing = self.prompt, "no question before an answer"
        elif not row.response.strip():
            column, missing = self.response, "no answer to a question"
        else:
            return None
        whole = self.conversation
        return f'empty "{column}"' if whole is None else f'{missing} in "{whole}"'

    def leaks(self, row: TextRow) -> bool:
        """Return whether the history already holds the row's own question and answer."""
        return self.history is not None and (row.prompt, row.response) in row.history


class Finder(NamedTuple):
    """The columns of a file, and its first rows, which tell formats apart."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[RawRow]
    needs_answers: bool

    def named(self, usual: Iterable[str]) -> list[str]:
        """Return the columns with one of these names, in the order of the names."""
        by_lower = _by_lower(self.columns)
        return [by_lower[name] for name in usual if name in by_lower]

    def one(self, *usual: str) -> str | None:
        """Return the first column with one of these names."""
        return next(iter(self.named(usual)), None)

    def only(self, flag: str) -> str | None:
        """Return the only column whose name is usual for a flag; DataError if there are several."""
        found = self.named(_USUAL[flag])
        if len(found) > 1:
            names = " or ".join(f'"{name}"' for name in found)
            raise self.fault(f"{_NOUNS[flag]} may be {names}; name it with {flag}.")
        return found[0] if found else None

    def layout(self, name: str, prompt: str, response: str | None) -> Layout:
        """Return a layout with the columns of earlier turns and system texts, if any."""
        history, system = self.one(HISTORY), self.one(SYSTEM)
        return Layout(name, prompt, response=response, history=history, system=system)

    def fault(self, message: str, kind: type[UnknownColumns] = UnknownColumns) -> UnknownColumns:
        """Return an error that lists the columns."""
        names = ", ".join(f'"{name}"' for name in self.columns) or "none"
        return kind(self.path, None, f"{message} The columns here are: {names}.")


_USUAL = {
    "--prompt_column": PROMPT_NAMES,
    "--input_column": INPUT_NAMES,
    "--response_column": RESPONSE_NAMES,
    "--history_column": (HISTORY,),
}
_NOUNS = {"--prompt_column": "the prompt", "--response_column": "the answer"}


def find_layout(
    path: Path, rows: Sequence[RawRow], row_format: RowFormat, *, needs_answers: bool = True
) -> Layout:
    """Return what the columns mean: those named, the rest as --format says or as detected.

    DataError if that is unknown, or a named column is missing. needs_answers False accepts a file
    without a column of answers.
    """
    columns: dict[str, None] = {}
    for row in rows:
        if not row.columns.keys() <= columns.keys():
            columns.update(dict.fromkeys(row.columns))
    finder = Finder(path, list(columns), rows[:100], needs_answers)
    if row_format.named_columns:
        return _named_layout(finder, row_format)
    if row_format.format != "auto":
        return _asked_layout(finder, row_format.format)
    for pair in PAIRS:
        found = finder.named(pair)
        if len(found) == len(pair):
            return finder.layout("columns", *found)
    layout = (
        _alpaca_layout(finder)
        or _conversation_layout(finder, CONVERSATION_NAMES)
        or _usual_layout(finder)
        or _conversation_layout(finder, (*DIALOGUE_NAMES, HISTORY))
    )
    if layout is not None:
        return layout
    if needs_answers:
        to_answer = finder._replace(needs_answers=False)
        layout = _alpaca_layout(to_answer) or _usual_layout(to_answer)
        if layout is not None:
            raise finder.fault(
                f'there are prompts ("{layout.prompt}") and no answers, which training and '
                "validation need; if a column has them, name it with --response_column.",
                NoAnswers,
            )
    advice = suggest_flags(finder.columns, row_format)
    raise finder.fault(f"no known format; name the columns: {advice}.")


def _named_layout(finder: Finder, row_format: RowFormat) -> Layout:
    """Return the layout of named columns; if the prompt is named, only the answer is guessed."""
    named = row_format.named_columns
    free = [name for name in finder.columns if name not in named.values()]
    others = finder._replace(columns=free)
    for flag, column in named.items():
        if column in finder.columns:
            continue
        guess = guess_column(column, free)
        if flag == "--response_column" and not finder.needs_answers and guess is None:
            continue  # a test set without answers
        meant = f' Was "{guess}" meant?' if guess is not None else ""
        raise finder.fault(f'no column "{column}".{meant} Name the right one with {flag}.')
    prompt, response = row_format.prompt_column, row_format.response_column
    history, text = row_format.history_column, row_format.input_column
    if prompt is None:
        prompt = others.one(*INSTRUCTION_NAMES)
        if prompt is not None and text is None:
            text = others.one(*INPUT_NAMES)
        prompt = prompt or others.only("--prompt_column")
        if prompt is None:
            raise finder.fault("which column is the prompt? Name it with --prompt_column.")
        history = history or others.one(HISTORY)
    if response is None:
        response = others.one("summary") or others.only("--response_column")
        if response is None and finder.needs_answers:
            raise finder.fault("which column is the answer? Name it with --response_column.")
    elif response not in finder.columns:
        response = None
    return Layout("columns", prompt, text, response, history, others.one(SYSTEM))


def _asked_layout(finder: Finder, name: str) -> Layout:
    """Return the layout of a --format; DataError if its columns are missing."""
    layout: Layout | None
    if name == "columns":
        layout, needed = _usual_layout(finder), "one column of prompts and one of answers"
    elif name == "alpaca":
        layout, needed = _alpaca_layout(finder), 'columns "instruction" and "output"'
    else:
        names = {"history": (HISTORY,), "messages": ("messages",)}.get(name, LIMA_NAMES)
        layout = _conversation_layout(finder, names)
        quoted = " or ".join(f'"{one}"' for one in names)
        needed = f"a column {quoted} that holds a list of turns"
    if layout is None:
        raise finder.fault(f"--format {name} needs {needed}; leave it out to have it found.")
    return layout


def _alpaca_layout(finder: Finder) -> Layout | None:
    instruction, response = finder.one(*INSTRUCTION_NAMES), finder.one("output", *RESPONSE_NAMES)
    if instruction is None or (response is None and finder.needs_answers):
        return None
    layout = finder.layout("alpaca", instruction, response)
    return replace(layout, input=finder.one(*INPUT_NAMES))


def _usual_layout(finder: Finder) -> Layout | None:
    """Return one column of prompts and one of answers, by their usual names."""
    response = finder.only("--response_column")
    if response is None and finder.needs_answers:
        return None
    prompt = finder.only("--prompt_column")
    return None if prompt is None else finder.layout("columns", prompt, response)


def _conversation_layout(finder: Finder, names: tuple[str, ...]) -> Layout | None:
    """Return the first of the columns that holds turns.

    Only under LIMA's name are texts turns: elsewhere, the speakers in a list of texts are unknown.
    """
    for column in finder.named(names):
        values = (row.columns.get(column) for row in finder.rows)
        first = next((value for value in values if value), None)
        if isinstance(first, str):
            first = _parsed(first)  # as in CSV
        turn = first[0] if isinstance(first, list) and first else first
        kind = None
        if isinstance(turn, dict) and isinstance(first, list):
            kind = "messages" if "role" in turn else "sharegpt"
        elif isinstance(turn, list):
            kind = "history"
        elif isinstance(turn, str) and column.strip().lower() in LIMA_NAMES:
            kind = "lima"
        if kind is not None:
            system, tools = finder.one(SYSTEM), finder.one(TOOLS)
            return Layout(kind, conversation=column, system=system, tools=tools)
    return None


def guess_column(wanted: str, found: Iterable[str], usual: tuple[str, ...] = ()) -> str | None:
    """Return the column that was probably meant; None if no name is similar or usual.

    >>> guess_column("content", ["contents", "title"])
    'contents'
    >>> guess_column("content", ["answer", "question"], PROMPT_NAMES)
    'question'
    """
    by_lower = _by_lower(found)
    known = [name for name in usual if name in by_lower]
    best = difflib.get_close_matches(wanted.lower(), by_lower, n=1) or known
    return by_lower[best[0]] if best else None


def _by_lower(names: Iterable[str]) -> dict[str, str]:
    """Return names by their stripped lower-case form, the first of those that share one."""
    return {name.strip().lower(): name for name in reversed(list(names))}


def suggest_flags(columns: Sequence[str], row_format: RowFormat) -> str:
    """Return the flags that name every column which belongs to a row; NAME if none is usual.

    >>> suggest_flags(["instruction", "input", "reply"], RowFormat())
    '--prompt_column instruction --input_column input --response_column NAME'
    """
    flags: dict[str, str] = {}
    for flag, usual in _USUAL.items():
        free = [column for column in columns if column not in flags.values()]
        named = row_format.named_columns.get(flag)
        guess = named if named in free else guess_column(named or "", free, usual)
        if guess is not None or flag in _NOUNS:
            flags[flag] = guess or guess_column(usual[0], free) or "NAME"
    return " ".join(f"{flag} {quote(column)}" for flag, column in flags.items())


# Rows


def to_text_rows(
    row: RawRow, layout: Layout, *, turns: Turns = "all", needs_answers: bool = True
) -> list[TextRow]:
    """Return a row as prompt, answer and history; a conversation as one such row per answer.

    A conversation may end in a question: that is a row with the answer "". turns "last" keeps only
    the last row, with needs_answers the last that has an answer. DataError if a field has the wrong
    shape; an empty or missing one is "".
    """
    if layout.conversation is not None:
        rows = list(_rows_of_turns(row, layout))
        if turns == "all":
            return rows
        answered = [row for row in rows if row.response.strip()] if needs_answers else []
        return (answered or rows)[-1:]
    prompt, response = _text(row, layout.prompt), _text(row, layout.response)
    more = _text(row, layout.input)
    prompt = f"{prompt}\n{more}" if more.strip() and prompt.strip() else prompt or more
    history = _history(row, layout.history) if layout.history is not None else ()
    system = _text(row, layout.system)
    if system.strip() and history:
        (question, answer), *rest = history
        history = ((f"{system}\n{question}", answer), *rest)
    elif system.strip() and prompt.strip():
        prompt = f"{system}\n{prompt}"
    return [TextRow(row.line, prompt, response, history, system=system if history else "")]


def _rows_of_turns(row: RawRow, layout: Layout) -> Iterator[TextRow]:
    """Yield a row for each answer of a conversation, and one for a last question without any."""
    column = str(layout.conversation)
    system = "\n".join(
        text for text in (_text(row, layout.system), _tools(row, layout.tools)) if text.strip()
    )
    question = ""
    history: list[tuple[str, str]] = []
    is_open, num_answers = False, 0  # is_open: the question has no answer yet
    speaker = ""
    for role, text, is_trained in _merged(_turns(row, column)):
        if role == "system":
            if question or history:
                raise row.fault(f'"{column}" has a system turn after the first; put it first.')
            system = f"{system}\n{text}" if system else text
        elif role == "user":
            if question:  # one without an answer is asked along with the next
                question = f"{question}\n{text}"
            else:
                has_system = system.strip() and text.strip() and not history
                question = f"{system}\n{text}" if has_system else text
            is_open = True
        else:
            skipped = None if is_trained else f'weight 0 in "{column}"'
            before = ""  # what an answer of another weight has said to the same question
            if not question and history and speaker == "assistant":
                question, before = history.pop()
            kept = system if history else ""
            yield TextRow(row.line, question, text, tuple(history), skipped, kept)
            is_open, num_answers = False, num_answers + 1
            if text.strip() or before:
                if question:
                    history.append((question, f"{before}\n{text}" if before else text))
                question = ""
        speaker = role
    if is_open or not num_answers:
        yield TextRow(row.line, question, "", tuple(history), system=system if history else "")


def _tools(row: RawRow, column: str | None) -> str:
    """Return what a conversation may call, as text; "" for nothing."""
    tools = row.columns.get(column) if column is not None else None
    if tools and not isinstance(tools, str):
        try:
            tools = write_json(tools)
        except ValueError as problem:
            raise row.fault(f'"{column}" is {problem}.') from problem
    return _clean(tools) if tools and tools.strip() != "[]" else ""


Turn = tuple[str, str, bool]  # role (system, user or assistant), text, whether it is trained on


def _merged(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Join consecutive turns of one role and one weight by line breaks."""
    for (role, is_trained), same in groupby(turns, key=itemgetter(0, 2)):
        yield role, "\n".join(text for _, text, _ in same), is_trained


def _turns(row: RawRow, column: str) -> Iterator[Turn]:
    value = row.columns.get(column)
    if isinstance(value, str) and _LIST_TEXT.match(value):  # as in CSV
        try:
            value = parse_json(value)
        except ValueError as problem:
            raise row.fault(
                f'"{column}" looks like a list of turns and is not JSON: {problem}; write it with '
                "json.dumps."
            ) from problem
    if value is None or value == "":
        return
    if isinstance(value, str):
        value = [value]  # a question alone
    if not isinstance(value, list):
        raise row.fault(f'"{column}" is {kind_of(value)}; make it a list of turns.')
    for index, turn in enumerate(value):
        name = f'turn {index + 1} of "{column}"'
        if isinstance(turn, str):
            yield ("assistant" if index % 2 else "user"), _clean(turn), True
            continue
        pair = _as_pair(turn)
        if pair is not None:
            yield "user", _field(row, f"the question of {name}", pair[0]), True
            if pair[1] is not None:
                yield "assistant", _field(row, f"the answer of {name}", pair[1]), True
            continue
        if not isinstance(turn, dict):
            raise row.fault(
                f"{name} is {_shape_of(turn)}; make it a text, a pair [question, answer] or "
                '{"role": ..., "content": ...}.'
            )
        said = _said(row, name, _first(turn, _TEXT_KEYS))
        calls = turn.get(_CALLS)
        if isinstance(calls, list) and calls:
            said = "\n".join([said] * bool(said.strip()) + [_call(call) for call in calls])
        is_trained = not any(_is_zero(turn[key]) for key in _WEIGHT_KEYS if key in turn)
        yield _role(row, name, _first(turn, _ROLE_KEYS)), said, is_trained


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _shape_of(turn: Any) -> str:
    return kind_of(turn) + (f" of {len(turn)} items" if isinstance(turn, list) else "")


def _call(call: Any) -> str:
    """Write one of OpenAI's tool calls as ShareGPT writes a function_call."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        call = {"name": function.get("name"), "arguments": arguments}
    return _clean(write_json(call))


def _as_pair(turn: Any) -> tuple[Any, Any] | None:
    """Return question and answer of a turn that holds both."""
    if isinstance(turn, list) and len(turn) == 2:
        return turn[0], turn[1]
    if isinstance(turn, dict):
        for question, answer in _PAIR_KEYS:
            if turn.get(question) is not None and answer in turn:
                return turn[question], turn[answer]
    return None


def _role(row: RawRow, name: str, role: Any) -> str:
    word = role.strip().lower() if isinstance(role, str) else ""
    if word not in _ROLES:
        given = f'has the role "{role}"' if isinstance(role, str) else "has no role"
        advice = "use system, user (human) and assistant (gpt), in one spelling"
        raise row.fault(f"{name} {given}; {advice}.")
    return _ROLES[word]


def _said(row: RawRow, name: str, value: Any) -> str:
    """Return a turn's text; OpenAI's list of text parts is joined."""
    if not isinstance(value, list):
        return _field(row, name, value)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise row.fault(f'{name} has a part of the type "{kind}"; only text is learned.')
        if isinstance(part, dict):
            part = next((part[key] for key in ("text", "value", "content") if key in part), None)
        texts.append(_field(row, name, part))
    return "\n".join(texts)


def _is_zero(weight: Any) -> bool:
    try:
        return float(weight) == 0
    except (TypeError, ValueError):
        return False


def _history(row: RawRow, column: str) -> History:
    """Return the earlier turns; a string (as in CSV) is read as JSON."""

    def error(problem: str) -> DataError:
        return row.fault(
            f'the history "{column}" has the wrong shape: {problem}; it must be a list of pairs '
            '[["question", "answer"], ...], or [].'
        )

    value = row.columns.get(column)
    if isinstance(value, str):
        try:
            value = value.strip() and parse_json(value)
        except ValueError as problem:
            raise error(str(problem)) from problem
    if not value:
        return ()
    if not isinstance(value, list):
        raise error(f"it is {kind_of(value)}")
    if all(isinstance(turn, dict) and turn.keys() & set(_ROLE_KEYS) for turn in value):
        roles, texts, _ = zip(*_merged(_turns(row, column)), strict=True)
        if roles != ("user", "assistant") * (len(roles) // 2):
            raise error(f"its turns are {', '.join(roles)}")
        return tuple(zip(texts[::2], texts[1::2], strict=True))
    turns = []
    for index, turn in enumerate(value):
        pair = _as_pair(turn)
        if pair is None:
            raise error(f"turn {index + 1} is {_shape_of(turn)}")
        name = f'turn {index + 1} of the history "{column}"'
        turns.append((_field(row, name, pair[0]), _field(row, name, pair[1])))
    return tuple(turns)


def _text(row: RawRow, column: str | None) -> str:
    """Return a column as text, "" for none; a number is its own digits (the reader keeps them)."""
    if column is None:
        return ""
    value = row.columns.get(column)
    if isinstance(value, str) and value.isprintable():  # most values: spares the name below
        return str(value)
    return _field(row, f'the field "{column}"', value)


def _field(row: RawRow, name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        advice = "make it a string (numbers may stay as they are)"
        raise row.fault(f"{name} is {kind_of(value)}; {advice}.")
    return _clean(value)


def _clean(text: str) -> str:
    """Replace half of a surrogate pair, as in "\\ud83d": it can be written to no file."""
    if text.isprintable():
        return str(text)  # Digits become a plain string
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parsed(text: str) -> Any:
    """Return the JSON value in a text, or the text if there is none."""
    try:
        return parse_json(text) or text
    except ValueError:
        return text
