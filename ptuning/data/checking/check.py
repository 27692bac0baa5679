"""What `python -m ptuning data check` counts in a data file, and text that is not content.

Rows are read as training reads them and encoded in chunks, so memory holds the file's rows, a
digest and two lengths for each, but never all tokens.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ptuning.data.checking.findings import FileCounts
from ptuning.data.dataset import collector_paused, in_chunks
from ptuning.data.formats import Layout, UnknownColumns, find_layout
from ptuning.data.parsing import DataFile, open_data
from ptuning.data.prompts import Example, RowFormat, TextRow, to_example
from ptuning.data.raw_file import DataError, RawRow
from ptuning.data.reading import count_unused, find_left_out, make_rows, read_raw_rows
from ptuning.data.tokenizer import LEADING_PIECES, TRAILING_PIECES, ChatGLMTokenizer

DIGEST_BYTES = 16
REPLACEMENT = "\ufffd"  # what editors write in place of a character that they could not read
# What stands for an empty cell; pandas' read_csv reads all of them so.
MISSING_WORDS = {"nan", "NaN", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>"}
# Inputs that say there is none, reduced to letters and digits: those of Alpaca's rows, and Chinese
NO_INPUT = {"na", "ninput", "noinput", "noinputneeded", "noinputrequired", "none", "noput"}
NO_INPUT |= {"无", "无输入", "没有输入", "不需要输入", "无需输入"}
_UNKNOWN_MARK = re.compile(r"<UNK>|\[UNK\]", re.IGNORECASE)  # in 30 % of ADGEN's answers
# Written-out control tokens. Here they are encoded as plain text, but `<n>`, `<|tab|>` and
# `<|blank_k|>` are decoded as whitespace, and other programs, including the published code, read
# control tokens out of them. The names are those of this vocabulary, image tokens of its older
# release, bytes, and the form <|...|> of this and later models.
_NAMED = "|".join(
    re.escape(piece) for piece in sorted({*LEADING_PIECES, *TRAILING_PIECES}, key=len, reverse=True)
)
_CONTROL_NAME = re.compile(
    rf"{_NAMED}|<image_\d+>|<0x[0-9A-F]{{2}}>|<\|[A-Za-z][\w .:-]{{0,38}}\|>", re.ASCII
)
# {{name}} as in LLaMA-Factory's identity.json, and <NAME> as in its self_cognition.json; the
# latter not after a letter, as in C++'s vector<INT>.
_BRACES = re.compile(r"\{\{ ?\w{1,40} ?\}\}")
_CAPITALS = re.compile(r"(?<![A-Za-z0-9_])<([A-Z][A-Z _-]{0,40}[A-Z])>")
_NO_PLACEHOLDERS = {"UNK", "PAD", "MASK", "BOS", "EOS", "SEP", "CLS", "ENC", "BR", "HR"}


@collector_paused()
def check_file(
    path: Path | str,
    tokenizer: ChatGLMTokenizer,
    row_format: RowFormat,
) -> FileCounts:
    """Read a whole file and count, faults included; no content of a file raises an error."""
    counts = FileCounts(Path(path), row_format)
    try:
        file = open_data(counts.path)
    except DataError as error:
        counts.unreadable = str(error)
        return counts
    raw_rows = _read(counts, file)
    counts.layout = _find_layout(counts, raw_rows)
    if counts.layout is None:
        return counts
    rows = _used_rows(counts, raw_rows, counts.layout)
    lengths = []
    title = f"checking {counts.path.name}"
    for chunk in in_chunks(rows, title):
        examples = [to_example(row, row_format) for row in chunk]
        for row, example in zip(chunk, examples, strict=True):
            _count_text(counts, counts.layout, row, example)
            _count_repeats(counts, row.line, example)
        lengths.append(_count_tokens(counts, chunk, examples, tokenizer))
    if lengths:
        counts.lengths = np.concatenate(lengths)  # (rows, 2)
    _drop_whole_characters(counts.words["spelled_character"], tokenizer)
    return counts


def _read(counts: FileCounts, file: DataFile) -> list[RawRow]:
    """Return the rows as they are; count the faults between them."""
    faults: list[DataError] = []
    rows = read_raw_rows(file, faults)
    _count_broken(counts, faults)
    fault = file.encoding_fault
    counts.encoding_fault = None if fault is None else fault.message
    counts.decoded = file.decoded._replace(text="")
    counts.unit, counts.notes, counts.num_read = file.unit, file.notes, len(rows)
    filled = count_unused(rows, Layout("columns"))
    names = dict.fromkeys(chain.from_iterable(row.columns for row in rows))
    counts.columns = {name: filled.get(name, 0) for name in names}
    if not rows:
        counts.unreadable = f"{file.path}: no row can be read; the first fault is {faults[0]}"
    return rows


def _count_broken(counts: FileCounts, faults: list[DataError]) -> None:
    for fault in faults:
        counts.add("broken_row", fault.line or 1, str(fault))


def _find_layout(counts: FileCounts, rows: list[RawRow]) -> Layout | None:
    """Return the meaning of the columns, those of answers included if known; None without prompts.

    counts.columns_fault says what is not known.
    """
    for needs_answers in (True, False) if rows else ():
        try:
            return find_layout(counts.path, rows, counts.row_format, needs_answers=needs_answers)
        except UnknownColumns as error:
            counts.columns_fault = str(error).removeprefix(f"{counts.path}: ")
    return None


def _used_rows(counts: FileCounts, raw_rows: list[RawRow], layout: Layout) -> list[TextRow]:
    """Return the rows that training would use or, in a file without answers, those with a prompt.

    The others are counted, as are the columns that are not used.
    """
    faults: list[DataError] = []
    made = list(make_rows(raw_rows, layout, counts.row_format.turns, faults))
    _count_broken(counts, faults)
    counts.num_made = len(made)
    counts.has_answers = not made or any(row.response.strip() for row, _ in made)
    used = []
    for row, source in made:
        reason = layout.lack(row)
        if reason is None or (not counts.has_answers and row.prompt.strip()):
            used.append((row, source))
            text = source.columns.get(layout.input) if layout.input is not None else None
            if isinstance(text, str) and is_fake_input(text):
                counts.add("fake_input", row.line, text)
        else:
            kind = "empty_field" if row.skipped is None else "untrained_turn"
            counts.lacking[kind, reason].append(row.line)
    rows = [row for row, _ in used]
    unused = count_unused(raw_rows, layout)
    counts.left_out = find_left_out(rows, [source for _, source in used], unused, layout)
    return rows


def _count_text(counts: FileCounts, layout: Layout, row: TextRow, example: Example) -> None:
    """Count odd words in a row's text, and an answer that its own history contains."""
    texts = (example.prompt, example.response)
    if any(mark in text for text in texts for mark in ("<", "[", "{{", "＜", "［")):  # few have one
        for kind, find in (
            ("control_text", find_control_names),
            ("placeholder", find_placeholders),
        ):
            names = dict.fromkeys(chain.from_iterable(map(find, texts)))  # each once, in order
            if names:
                counts.words[kind].update(names.keys())
                counts.add(kind, row.line)
        for kind, text in zip(("unknown_mark_prompt", "unknown_mark"), texts, strict=True):
            if _UNKNOWN_MARK.search(text):
                counts.add(kind, row.line)
    is_ours = counts.decoded is not None and counts.decoded.damaged_lines  # our own U+FFFD
    if not is_ours and any(REPLACEMENT in text for text in texts):
        counts.add("lost_character", row.line)
    missing = MISSING_WORDS.intersection((row.prompt, row.response))
    if missing:
        counts.add("missing_word", row.line, ", ".join(sorted(missing)))
    if row.history and layout.leaks(row):
        counts.add("leak", row.line)


def _count_repeats(counts: FileCounts, place: int, example: Example) -> None:
    """Look for the row and its prompt among those before it."""
    prompt = _digest(example.prompt)
    row = prompt + _digest(example.response)
    if row in counts.rows:
        first = counts.rows[row]
        counts.add("duplicate_row", place, f"{counts.unit} {place} = {counts.unit} {first}")
        return
    counts.rows[row] = place
    if prompt in counts.prompts:
        counts.contested.setdefault(prompt, [counts.prompts[prompt]]).append(place)
    else:
        counts.prompts[prompt] = place


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def _count_tokens(
    counts: FileCounts,
    chunk: Sequence[TextRow],
    examples: Sequence[Example],
    tokenizer: ChatGLMTokenizer,
) -> np.ndarray:
    """Return (rows, 2) lengths of prompts and answers; count the characters of rows with bytes."""
    texts = [text for example in examples for text in (example.prompt, example.response)]
    encoded = tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    lengths = lengths.reshape(-1, 2)  # (rows, 2)
    ends = np.cumsum(lengths.sum(axis=1))  # of each row in ids
    needed = lengths if counts.has_answers else lengths[:, :1]
    for kind, flags in (
        ("no_tokens", ~needed.all(axis=1)),
        ("unknown_token", _sums_between(ids == tokenizer.unk_token_id, ends)),
        ("spelled_character", _sums_between(np.isin(ids, tokenizer.byte_ids), ends)),
    ):
        for index in np.flatnonzero(flags).tolist():
            counts.add(kind, chunk[index].line)
            if kind == "spelled_character":
                counts.words[kind].update("".join(texts[2 * index : 2 * index + 2]))
    return lengths


def _sums_between(flags: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the number of True in each of the consecutive parts of flags, some of them empty."""
    return np.diff(np.concatenate([[0], np.cumsum(flags)])[ends], prepend=0)


def _drop_whole_characters(characters: Counter[str], tokenizer: ChatGLMTokenizer) -> None:
    """Keep only the characters that the vocabulary writes as bytes."""
    byte_ids = set(tokenizer.byte_ids)
    names = list(characters)
    for name, ids in zip(names, tokenizer.encode_batch(names), strict=True):
        if byte_ids.isdisjoint(ids):
            del characters[name]


# Odd words: training takes them as they are


def find_control_names(text: str) -> list[str]:
    """Return every control token spelled out in a text, in order; full-width forms count.

    >>> find_control_names("好<eop>的＜sop＞ x < y [0]")
    ['<eop>', '<sop>']
    """
    if "＜" in text or "［" in text:
        text = unicodedata.normalize("NFKC", text)  # as SentencePiece does after any search
    return _CONTROL_NAME.findall(text)


def find_placeholders(text: str) -> list[str]:
    """Return the words that a template left to be filled in, such as {{name}} and <NAME>, in order.

    Template code such as {{item.name}}, control tokens and HTML are none.

    >>> find_placeholders("我是{{name}}，由<AUTHOR>开发。<B>x</B> <UNK>")
    ['{{name}}', '<AUTHOR>']
    """
    found = []
    if "{{" in text:
        names = _BRACES.findall(text)
        found = names if len(names) == text.count("{{") and "{%" not in text else []
    if "<" in text:
        for name in _CAPITALS.findall(text):
            is_tag = f"</{name}>" in text or is_fake_input(name)
            if name not in _NO_PLACEHOLDERS and not is_tag:
                found.append(f"<{name}>")
    return found


def is_fake_input(text: str) -> bool:
    """Return whether an input says that there is none: "No input", "<noinput>", "N/A".

    >>> is_fake_input("\\\\<noinput\\\\>"), is_fake_input("No."), is_fake_input("n = 1, a = 2")
    (True, False, False)
    """
    return "".join(filter(str.isalnum, text.lower())) in NO_INPUT
