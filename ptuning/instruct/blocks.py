"""Numbered blocks of tasks: written into a prompt, and read back from a completion.

A task is written as Stanford Alpaca does, `###` between tasks and a number before each label, and
the prompt ends in an open label. A completion is read by its labels, not by its numbers or its
separators, since models restart the numbers, skip some, and forget separators.
Source: https://github.com/tatsu-lab/stanford_alpaca/blob/761dc5b/generate_instruction.py
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptuning.data.checking.check import is_fake_input

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
FIELDS = {  # label: field
    **{"instruction": INSTRUCTION, "input": INPUT, "output": OUTPUT},
    **{"指令": INSTRUCTION, "输入": INPUT, "输出": OUTPUT},
}
_FENCE = re.compile(r"```\w*[ \t]*")
_LAST_SEPARATOR = re.compile(r"(?:^|\n)[ \t]*#+[ \t]*$")


class Task(NamedTuple):
    """An instruction, its input ("" for none), and the output that completes it."""

    instruction: str
    input: str
    output: str


class Block(NamedTuple):
    """A task as it was read; fault: why it cannot be kept whole, None if it can."""

    task: Task
    fault: str | None = None


def write_block(task: Task, number: int, labels: Mapping[str, str], no_input: str) -> str:
    r"""Write a task; labels are the names of its fields, each with its colon.

    >>> labels = {"instruction": "Instruction: ", "input": "Input:", "output": "Output:"}
    >>> write_block(Task("Add  them:", "1, 2", "3"), 2, labels, "<noinput>")
    '###\n2. Instruction: Add them\n2. Input:\n1, 2\n2. Output:\n3\n'
    """
    instruction = " ".join(task.instruction.split()).rstrip(":：")
    lines = ["###", f"{number}. {labels[INSTRUCTION]}{instruction}"]
    if INPUT in labels:
        lines += [f"{number}. {labels[INPUT]}", task.input or no_input]
    lines += [f"{number}. {labels[OUTPUT]}", task.output]
    return "\n".join(lines) + "\n"


def read_blocks(
    completion: str, *, is_cut: bool = False, fields: Mapping[str, str] = FIELDS
) -> tuple[list[Block], str]:
    """Return the blocks of a completion, and the text before the first that belongs to none.

    A JSON answer, one object or a list of them, is read too.

    is_cut: the completion ended at its length limit, so its last block may be incomplete. Faults,
    the first that holds: cut_off, repeated_field, missing_field, empty_output; no_fields for a
    completion without any label.
    """
    text = completion.replace("\r\n", "\n")
    records = _json_records(text, fields)
    if records is not None:
        return [_to_block(record, fields) for record in records], ""
    labels = _find_labels(text, fields)
    if not labels:
        return [Block(Task("", "", text.strip()), "no_fields")], ""
    text, preamble = _without_fence(text, labels[0].start())
    labels = _find_labels(text, fields)
    names = [fields[label["name"].lower()] for label in labels]
    records = []
    if names[0] != INSTRUCTION:  # the text before is the value of the label that the prompt ends in
        records, preamble = [[(INSTRUCTION, preamble)]], ""
    ends = [label.start() for label in labels[1:]] + [len(text)]
    for name, label, end in zip(names, labels, ends, strict=True):
        if name == INSTRUCTION:
            records.append([])
        records[-1].append((name, _trim(text[label.end() : end])))
    blocks = [_to_block(record, fields) for record in records]
    if is_cut:
        blocks[-1] = Block(blocks[-1].task, "cut_off")
    return blocks, preamble


def _find_labels(text: str, fields: Mapping[str, str]) -> list[re.Match[str]]:
    """Return the labels; where one carries a number, those without are text."""
    pattern = re.compile(
        # Possessive (+), or the optional parts would try every split of a long run of blanks.
        r"^[ \t]*+#*+[ \t]*+(?:\*\*)?+[ \t]*+(?P<number>\d++[ \t]*+[.、)）])?+[ \t]*+(?:\*\*)?+"
        rf"[ \t]*+(?P<name>{'|'.join(fields)})[ \t]*+(?:\*\*)?+[ \t]*+[:：](?:\*\*)?",
        re.IGNORECASE | re.MULTILINE,
    )
    labels = list(pattern.finditer(text))
    return [label for label in labels if label["number"]] or labels


def _without_fence(text: str, start: int) -> tuple[str, str]:
    """Remove a code fence around all labels; return the text and what precedes its first label."""
    before = text[:start].split("\n")
    opening = next((n for n, line in enumerate(before) if _FENCE.fullmatch(line)), None)
    if opening is not None:
        del before[opening]
        body = text[start:].rstrip()
        text = "\n".join(before) + body.removesuffix("```")
    return text, _trim("\n".join(before))


def _trim(text: str) -> str:
    """Remove the separators at the end of a value, and blank space at both ends."""
    text = text.strip()
    while found := _LAST_SEPARATOR.search(text):
        text = text[: found.start()].rstrip()
    return text


def _json_records(text: str, fields: Mapping[str, str]) -> list[list[tuple[str, str]]] | None:
    """Return the fields of each object of a JSON answer; None if the text is no such answer."""
    lines = [line for line in text.strip().split("\n") if not _FENCE.fullmatch(line.strip())]
    try:
        found: Any = json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None
    objects = found if isinstance(found, list) else [found]
    if not objects or not all(isinstance(one, dict) for one in objects):
        return None
    return [
        [
            (fields[key.lower()], _as_text(value))
            for key, value in one.items()
            if key.lower() in fields
        ]
        for one in objects
    ]


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if value is None else text.strip()


def _to_block(record: Sequence[tuple[str, str]], fields: Mapping[str, str]) -> Block:
    values = dict(reversed(record))  # of a repeated field, the first
    text = values.get(INPUT, "")
    text = "" if is_fake_input(text) else text
    task = Task(values.get(INSTRUCTION, ""), text, values.get(OUTPUT, ""))
    fault = None
    if len(record) > len(values):
        fault = "repeated_field"
    elif values.keys() < set(fields.values()) or not task.instruction:
        fault = "missing_field"
    elif not task.output:
        fault = "empty_output"
    return Block(task, fault)
