"""Step 2 of 5: the rows of a file, in any known format, to prompts, answers and earlier turns.

A layout says what the columns mean. It is found once per file, by the names of the columns and the
first conversation, unless columns were named. A conversation becomes one row per answer.
Formats: two columns such as ADGEN's; Alpaca, https://github.com/tatsu-lab/stanford_alpaca; ShareGPT
and OpenAI messages, https://github.com/hiyouga/LlamaFactory/tree/main/data; LIMA,
https://huggingface.co/datasets/GAIR/lima; rows of `history` alone.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ptuning.data.parsing import kind_of, parse_json, write_json
from ptuning.data.prompts import RowFormat, TextRow, Turns
from ptuning.data.raw_file import (
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
    DataError,
    RawRow,
)

PAIRS = (("content", "summary"), ("prompt", "response"))  # ADGEN and the row contract come first

USER_ROLES = {"user", "human", "prompter", "observation", "tool", "function", "function_response"}
ANSWER_ROLES = {"assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "function_call"}
SYSTEM_ROLES = {"system", "developer"}
ROLE_KEYS, TEXT_KEYS = ("from", "role", "speaker"), ("value", "content", "text")
WEIGHT_KEYS = ("loss_weight", "weight")
CALLS = "tool_calls"
_LIST_TEXT = re.compile(r"\s*\[\s*(\]\s*$|[\[{\"'])")
# Question and answer in one object
PAIR_KEYS = (
    *(("q", "a"), ("question", "answer"), ("human", "assistant"), ("user", "assistant")),
    *(("input", "output"), ("prompt", "response")),
)
# Everything that is read in a turn, or that says only who speaks
TURN_KEYS = {
    *(*ROLE_KEYS, *TEXT_KEYS, *WEIGHT_KEYS, CALLS, "tool_call_id", "name", "id"),
    *(key for pair in PAIR_KEYS for key in pair),
}


class UnknownColumns(DataError):
    """A named column that is not there, or columns whose meaning cannot be told."""


class NoAnswers(UnknownColumns):
    """Prompts, and no column of answers next to them."""


@dataclass(frozen=True)
class Layout:
    """What the columns of a file mean; None where it has no such column."""

    name: str  # a FormatName other than "auto"
    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None  # next to a conversation, what it may call: a part of the system text
    conversation: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns that are used, by what they mean."""
        roles = ("prompt", "input", "response", "history", "system", "tools", "conversation")
        return {role: name for role in roles if (name := getattr(self, role)) is not None}

    def __str__(self) -> str:
        """Say what is made of which column."""
        if self.conversation is not None:
            parts = (self.system, self.tools, f"the turns of {self.conversation}")
            return f"{self.name}: {' + '.join(part for part in parts if part is not None)}"
        before = [name for name in (self.system, self.history) if name is not None]
        prompt = " + ".join(name for name in (*before, self.prompt, self.input) if name is not None)
        return f"{self.name}: {prompt} -> {self.response or '(no answers)'}"

    def lack(self, row: TextRow) -> str | None:
        """Say why training leaves a row out; None if it does not."""
        if row.skipped is not None:
            return row.skipped
        whole = self.conversation
        if not row.prompt or row.prompt.isspace():
            return f'no question before an answer in "{whole}"' if whole else _empty(self.prompt)
        if not row.response or row.response.isspace():
            return f'no answer to a question in "{whole}"' if whole else _empty(self.response)
        return None

    def leaks(self, row: TextRow) -> bool:
        """Say whether a column of earlier turns already holds the row's own question and answer."""
        return self.history is not None and any(
            answer == row.response and question == row.prompt for question, answer in row.history
        )


def _empty(column: str | None) -> str:
    return f'empty "{column}"'


class Finder(NamedTuple):
    """The columns of a file, and its first rows to tell formats apart by."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[RawRow]
    needs_answers: bool

    def named(self, *usual: str) -> list[str]:
        """Return the columns with one of these names, in the order of the names."""
        by_lower = _by_lower(self.columns)
        return [by_lower[name] for name in usual if name in by_lower]

    def one(self, *usual: str) -> str | None:
        """Return the first column with one of these names."""
        return next(iter(self.named(*usual)), None)

    def fault(self, message: str, kind: type[UnknownColumns] = UnknownColumns) -> UnknownColumns:
        """Return an error that lists the columns."""
        shown = ", ".join(f'"{name}"' for name in self.columns) or "none"
        return kind(self.path, None, f"{message} The columns here are: {shown}.")


def find_layout(
    path: Path, rows: Sequence[RawRow], row_format: RowFormat, *, needs_answers: bool = True
) -> Layout:
    """Return what the columns mean: those named, the rest as --format says or as they look.

    DataError where that cannot be told, or a named column is not there. needs_answers False takes a
    file without a column of answers.
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
        if len(finder.named(*pair)) == len(pair):
            return _columns_layout(finder, *finder.named(*pair))
    layout = (
        _alpaca_layout(finder)
        or _conversation_layout(finder, CONVERSATION_NAMES)
        or _usual_layout(finder)
        or _conversation_layout(finder, (*DIALOGUE_NAMES, HISTORY))
    )
    if layout is None and needs_answers:
        to_answer = finder._replace(needs_answers=False)
        layout = _alpaca_layout(to_answer) or _usual_layout(to_answer)
        if layout is not None:
            raise finder.fault(
                f'there are prompts ("{layout.prompt}") and no answers, which training and '
                "validation need; if a column has them, name it with --response_column.",
                NoAnswers,
            )
    if layout is None:
        advice = suggest_flags(finder.columns, row_format)
        raise finder.fault(f"no known format; name the columns: {advice}.")
    return layout


def _named_layout(finder: Finder, row_format: RowFormat) -> Layout:
    """Return the layout of named columns; where the prompt is named, only the answer is guessed."""
    for flag, column in row_format.named_columns.items():
        if column in finder.columns:
            continue
        unnamed = [name for name in finder.columns if name not in row_format.named_columns.values()]
        guess = guess_column(column, unnamed)
        if flag == "--response_column" and not finder.needs_answers and guess is None:
            continue  # a test set without answers
        meant = f' Was "{guess}" meant?' if guess is not None else ""
        raise finder.fault(f'no column "{column}".{meant} Name the right one with {flag}.')
    prompt, response = row_format.prompt_column, row_format.response_column
    history, text = row_format.history_column, row_format.input_column
    others = finder._replace(
        columns=[name for name in finder.columns if name not in row_format.named_columns.values()]
    )
    if prompt is None:
        prompt = others.one(*INSTRUCTION_NAMES)
        is_instruction = prompt is not None
        prompt = prompt or _only(others, PROMPT_NAMES, "--prompt_column", "the prompt")
        if prompt is None:
            raise finder.fault("which column is the prompt? Name it with --prompt_column.")
        history = history or others.one(HISTORY)
        if text is None and is_instruction:
            text = others.one(*INPUT_NAMES)
    if response is None:
        response = others.one("summary") or _only(
            others, RESPONSE_NAMES, "--response_column", "the answer"
        )
        if response is None and finder.needs_answers:
            raise finder.fault("which column is the answer? Name it with --response_column.")
    elif response not in finder.columns:
        response = None
    return Layout("columns", prompt, text, response, history, others.one(SYSTEM))


def _asked_layout(finder: Finder, name: str) -> Layout:
    """Return the layout of a --format; DataError where its columns are not there."""
    layout: Layout | None
    if name == "columns":
        layout, needed = _usual_layout(finder), "one column of prompts and one of answers"
    elif name == "alpaca":
        layout, needed = _alpaca_layout(finder), 'columns "instruction" and "output"'
    else:
        names = {"history": (HISTORY,), "messages": ("messages",)}.get(name, LIMA_NAMES)
        layout = _conversation_layout(finder, names)
        needed = " or ".join(f'"{one}"' for one in names)
        needed = f"a column {needed} that holds a list of turns"
    if layout is None:
        raise finder.fault(f"--format {name} needs {needed}; leave it out to have it found.")
    return layout


def _columns_layout(finder: Finder, prompt: str, response: str | None) -> Layout:
    return Layout(
        "columns",
        prompt=prompt,
        response=response,
        history=finder.one(HISTORY),
        system=finder.one(SYSTEM),
    )


def _alpaca_layout(finder: Finder) -> Layout | None:
    instruction, response = finder.one(*INSTRUCTION_NAMES), finder.one("output", *RESPONSE_NAMES)
    if instruction is None or (response is None and finder.needs_answers):
        return None
    return Layout(
        "alpaca",
        prompt=instruction,
        input=finder.one(*INPUT_NAMES),
        response=response,
        history=finder.one(HISTORY),
        system=finder.one(SYSTEM),
    )


def _usual_layout(finder: Finder) -> Layout | None:
    """Return one column of prompts and one of answers, by their usual names."""
    response = _only(finder, RESPONSE_NAMES, "--response_column", "the answer")
    if response is None and finder.needs_answers:
        return None
    prompt = _only(finder, PROMPT_NAMES, "--prompt_column", "the prompt")
    return None if prompt is None else _columns_layout(finder, prompt, response)


def _only(finder: Finder, usual: tuple[str, ...], flag: str, noun: str) -> str | None:
    """Return the only column with a usual name; DataError where there are several."""
    found = finder.named(*usual)
    if len(found) > 1:
        names = " or ".join(f'"{name}"' for name in found)
        raise finder.fault(f"{noun} may be {names}; name it with {flag}.")
    return found[0] if found else None


def _conversation_layout(finder: Finder, names: tuple[str, ...]) -> Layout | None:
    """Return the first of the columns that holds turns.

    Texts are turns under LIMA's name only: elsewhere, a list of texts has no known speakers.
    """
    for column in finder.named(*names):
        values = (row.columns.get(column) for row in finder.rows)
        first = next((value for value in values if value), None)
        if isinstance(first, str):
            first = _as_json(first) or first  # as in CSV
        turn = first[0] if isinstance(first, list) and first else first
        kind = None
        if isinstance(turn, dict) and isinstance(first, list):
            kind = "messages" if "role" in turn else "sharegpt"
        elif isinstance(turn, list):
            kind = "history"
        elif isinstance(turn, str) and column.strip().lower() in LIMA_NAMES:
            kind = "lima"
        if kind is not None:
            return Layout(
                kind, conversation=column, system=finder.one(SYSTEM), tools=finder.one(TOOLS)
            )
    return None


def guess_column(wanted: str, found: Iterable[str], usual: tuple[str, ...] = ()) -> str | None:
    """Return the column that was probably meant; None where no name is similar or usual.

    >>> guess_column("content", ["contents", "title"])
    'contents'
    >>> guess_column("content", ["answer", "question"], PROMPT_NAMES)
    'question'
    """
    by_lower = _by_lower(found)
    similar = difflib.get_close_matches(wanted.lower(), by_lower, n=1)
    known = [name for name in usual if name in by_lower]
    best = (similar or known)[:1]
    return by_lower[best[0]] if best else None


def _by_lower(names: Iterable[str]) -> dict[str, str]:
    """Return names by their bare lower-case form, the first of those that share one."""
    return {name.strip().lower(): name for name in reversed(list(names))}


def suggest_flags(columns: Sequence[str], row_format: RowFormat) -> str:
    """Return the flags that name every column which belongs to a row; NAME where none is usual.

    >>> suggest_flags(["instruction", "input", "reply"], RowFormat())
    '--prompt_column instruction --input_column input --response_column NAME'
    """
    flags: dict[str, str] = {}
    for flag, usual in (
        ("--prompt_column", PROMPT_NAMES),
        ("--input_column", INPUT_NAMES),
        ("--response_column", RESPONSE_NAMES),
        ("--history_column", (HISTORY,)),
    ):
        free = [column for column in columns if column not in flags.values()]
        named = row_format.named_columns.get(flag)
        by_lower = _by_lower(free)
        guess = next((by_lower[name] for name in usual if name in by_lower), None)
        if named is not None:
            guess = named if named in free else guess_column(named, free, usual)
        if guess is not None or flag in ("--prompt_column", "--response_column"):
            flags[flag] = guess or guess_column(usual[0], free) or "NAME"
    return " ".join(f"{flag} {quote(column)}" for flag, column in flags.items())


# Rows


def to_text_rows(
    path: Path, row: RawRow, layout: Layout, *, turns: Turns = "all", needs_answers: bool = True
) -> list[TextRow]:
    """Return a row as prompt, answer and history; a conversation as one such row per answer.

    A last question without an answer ends a conversation as a row with the answer "". turns "last"
    keeps the last row alone, with needs_answers the last that has an answer. DataError where a
    field has the wrong shape; an empty or missing one is "".
    """
    fields = row.columns
    if layout.conversation is not None:
        rows = list(_rows_of_turns(path, row, layout))
        if turns == "all":
            return rows
        answered = [row for row in rows if row.response.strip()] if needs_answers else []
        return (answered or rows)[-1:]
    assert layout.prompt is not None, "a layout has prompts or conversations"
    prompt = _text(path, row, layout.prompt, fields.get(layout.prompt))
    response = ""
    history: tuple[tuple[str, str], ...] = ()
    if layout.response is not None:
        response = _text(path, row, layout.response, fields.get(layout.response))
    if layout.input is not None:
        more = _text(path, row, layout.input, fields.get(layout.input))
        prompt = f"{prompt}\n{more}" if more.strip() and prompt.strip() else prompt or more
    if layout.history is not None:
        history = _history(path, row, layout.history, fields.get(layout.history))
    system = ""
    if layout.system is not None:
        system = _text(path, row, layout.system, fields.get(layout.system))
        prompt, history = _after_system(system, prompt, history)
    return [TextRow(row.line, prompt, response, history, system=system if history else "")]


def _after_system(
    system: str, prompt: str, history: tuple[tuple[str, str], ...]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Put the system text before the first question."""
    if not system.strip():
        return prompt, history
    if not history:
        return f"{system}\n{prompt}" if prompt.strip() else prompt, history
    (question, answer), *rest = history
    return prompt, ((f"{system}\n{question}", answer), *rest)


def _rows_of_turns(path: Path, row: RawRow, layout: Layout) -> Iterator[TextRow]:
    """Yield a row for each answer of a conversation, and one for a last question without any."""
    column = str(layout.conversation)
    system = ""
    if layout.system is not None:
        system = _text(path, row, layout.system, row.columns.get(layout.system))
    if layout.tools is not None:
        tools = row.columns.get(layout.tools)
        if tools and not isinstance(tools, str):
            try:
                tools = write_json(tools)
            except ValueError as problem:
                raise row.fault(path, f'"{layout.tools}" is {problem}.') from problem
        if tools and tools.strip() not in ("", "[]"):
            system = f"{system}\n{_clean(tools)}" if system.strip() else _clean(tools)
    question: str = ""
    history: list[tuple[str, str]] = []
    waits, num_answers = False, 0  # whether the question has no answer yet
    speaker = ""
    for role, text, is_trained in _merged(_turns(path, row, column)):
        if role == "system":
            if question or history:
                raise row.fault(
                    path, f'"{column}" has a system turn after the first; put it first.'
                )
            system = f"{system}\n{text}" if system else text
        elif role == "user":
            if question:  # one without an answer is asked along with the next
                question = f"{question}\n{text}"
            else:
                has_system = system.strip() and text.strip() and not history
                question = f"{system}\n{text}" if has_system else text
            waits = True
        else:
            skipped = None if is_trained else f'weight 0 in "{column}"'
            before = ""  # what an answer of another weight has said to the same question
            if not question and history and speaker == "assistant":
                question, before = history.pop()
            kept = system if history else ""
            yield TextRow(row.line, question, text, tuple(history), skipped, kept)
            waits, num_answers = False, num_answers + 1
            if text.strip() or before:
                if question:
                    history.append((question, f"{before}\n{text}" if before else text))
                question = ""
        speaker = role
    if waits or not num_answers:
        yield TextRow(row.line, question, "", tuple(history), system=system if history else "")


def _merged(turns: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[str, str, bool]]:
    """Join turns of one role, and one weight, by line breaks where they follow each other."""
    last: tuple[str, str, bool] | None = None
    for role, text, is_trained in turns:
        if last is not None and (last[0], last[2]) == (role, is_trained):
            last = (role, f"{last[1]}\n{text}", is_trained)
        else:
            if last is not None:
                yield last
            last = (role, text, is_trained)
    if last is not None:
        yield last


def _turns(path: Path, row: RawRow, column: str) -> Iterator[tuple[str, str, bool]]:
    """Yield role (system, user or assistant), text, and whether it is trained on."""
    value = row.columns.get(column)
    if isinstance(value, str) and _LIST_TEXT.match(value):  # as in CSV
        try:
            value = parse_json(value)
        except ValueError as problem:
            raise row.fault(
                path,
                f'"{column}" looks like a list of turns and is not JSON: {problem}; write it with '
                "json.dumps.",
            ) from problem
    if value is None or value == "":
        return
    if isinstance(value, str):
        value = [value]  # a question alone
    if not isinstance(value, list):
        raise row.fault(path, f'"{column}" is {kind_of(value)}; make it a list of turns.')
    for index, turn in enumerate(value):
        name = f'turn {index + 1} of "{column}"'
        if isinstance(turn, str):
            yield ("assistant" if index % 2 else "user"), _clean(turn), True
            continue
        pair = _as_pair(turn)
        if pair is not None:
            yield "user", _field(path, row, f"the question of {name}", pair[0]), True
            if pair[1] is not None:
                yield "assistant", _field(path, row, f"the answer of {name}", pair[1]), True
            continue
        if not isinstance(turn, dict):
            size = f" of {len(turn)} items" if isinstance(turn, list) else ""
            raise row.fault(
                path,
                f"{name} is {kind_of(turn)}{size}; make it a text, a pair [question, answer] or "
                '{"role": ..., "content": ...}.',
            )
        role = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
        text = next((turn[key] for key in TEXT_KEYS if turn.get(key) is not None), None)
        weights = [turn[key] for key in WEIGHT_KEYS if key in turn]
        is_trained = not any(_is_zero(weight) for weight in weights)
        said = _parts(path, row, name, text)
        calls = turn.get(CALLS)
        if isinstance(calls, list) and calls:
            said = "\n".join([said] * bool(said.strip()) + [_call(call) for call in calls])
        yield _role(path, row, name, role), said, is_trained


def _call(call: Any) -> str:
    """Write one of OpenAI's tool calls as ShareGPT writes a function_call."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return _clean(write_json(call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _as_json(arguments) or arguments
    return _clean(write_json({"name": function.get("name"), "arguments": arguments}))


def _as_pair(turn: Any) -> tuple[Any, Any] | None:
    """Return question and answer of a turn that holds both."""
    if isinstance(turn, list) and len(turn) == 2:
        return turn[0], turn[1]
    if isinstance(turn, dict):
        for question, answer in PAIR_KEYS:
            if turn.get(question) is not None and answer in turn:
                return turn[question], turn[answer]
    return None


def _role(path: Path, row: RawRow, name: str, role: Any) -> str:
    word = role.strip().lower() if isinstance(role, str) else ""
    for ours, theirs in (
        ("user", USER_ROLES),
        ("assistant", ANSWER_ROLES),
        ("system", SYSTEM_ROLES),
    ):
        if word in theirs:
            return ours
    given = f'has the role "{role}"' if isinstance(role, str) else "has no role"
    raise row.fault(
        path, f"{name} {given}; use system, user (human) and assistant (gpt), in one spelling."
    )


def _parts(path: Path, row: RawRow, name: str, value: Any) -> str:
    """Return a turn's text; OpenAI's list of text parts is joined."""
    if not isinstance(value, list):
        return _field(path, row, name, value)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise row.fault(path, f'{name} has a part of the type "{kind}"; only text is learned.')
        if isinstance(part, dict):
            part = next((part[key] for key in ("text", "value", "content") if key in part), None)
        texts.append(_field(path, row, name, part))
    return "\n".join(texts)


def _is_zero(weight: Any) -> bool:
    try:
        return float(weight) == 0
    except (TypeError, ValueError):
        return False


def _history(path: Path, row: RawRow, column: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns; a string (as in CSV) is read as JSON."""

    def error(problem: str) -> DataError:
        return row.fault(
            path,
            f'the history "{column}" has the wrong shape: {problem}; it must be a list of pairs '
            '[["question", "answer"], ...], or [].',
        )

    if isinstance(value, str):
        try:
            value = value.strip() and parse_json(value)
        except ValueError as problem:
            raise error(str(problem)) from problem
    if not value:
        return ()
    if not isinstance(value, list):
        raise error(f"it is {kind_of(value)}")
    turns = []
    if all(isinstance(turn, dict) and turn.keys() & set(ROLE_KEYS) for turn in value):
        said = [(role, text) for role, text, _ in _merged(_turns(path, row, column))]
        roles = [role for role, _ in said]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise error(f"its turns are {', '.join(roles)}")
        return tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))
    for index, turn in enumerate(value):
        pair = _as_pair(turn)
        if pair is None:
            size = f" of {len(turn)} items" if isinstance(turn, list) else ""
            raise error(f"turn {index + 1} is {kind_of(turn)}{size}")
        name = f'turn {index + 1} of the history "{column}"'
        turns.append((_field(path, row, name, pair[0]), _field(path, row, name, pair[1])))
    return tuple(turns)


def _text(path: Path, row: RawRow, column: str, value: Any) -> str:
    """Return a column as text: null is "", a number its own digits (the JSON reader keeps them)."""
    if isinstance(value, str) and value.isprintable():
        return str(value)  # Digits are a number no more
    return _field(path, row, f'the field "{column}"', value)


def _field(path: Path, row: RawRow, name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise row.fault(
            path, f"{name} is {kind_of(value)}; make it a string (numbers may stay as they are)."
        )
    return _clean(value)


def _clean(text: str) -> str:
    """Half of a surrogate pair, as in "\\ud83d", is no character and can be written to no file."""
    if text.isprintable():
        return str(text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as_json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
