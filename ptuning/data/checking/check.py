"""What `python -m ptuning data check` counts in a data file.

Rows are read as training reads them and encoded in chunks, so that memory holds the file's rows, a
digest and two lengths for each, and never all tokens.
"""

import hashlib
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from ptuning.data.checking.findings import MOST_EXAMPLES
from ptuning.data.checking.lengths import Side, sides_of
from ptuning.data.checking.odd_words import (
    MISSING_WORDS,
    REPLACEMENT,
    UNKNOWN_MARK,
    find_control_names,
    find_placeholders,
    is_fake_input,
    may_have_marks,
)
from ptuning.data.dataset import CHUNK_ROWS, collector_paused
from ptuning.data.formats import Layout, UnknownColumns, find_layout, to_text_rows
from ptuning.data.parsing import DataError, DataFile, RawRow, open_data
from ptuning.data.prompts import Example, RowFormat, TextRow, to_example
from ptuning.data.raw_file import DecodedText, say_encoding_fault
from ptuning.data.reading import LeftOut, count_unused, find_left_out
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.output import Progress

DIGEST_BYTES = 16
_FINDERS = {"control_text": find_control_names, "placeholder": find_placeholders}


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and which of its ids stand for bytes and for what it cannot write at all."""

    tokenizer: ChatGLMTokenizer
    is_byte: np.ndarray  # bool, one per id
    unknown_id: int

    @classmethod
    def of(cls, tokenizer: ChatGLMTokenizer) -> "Encoder":
        """Look the ids up, once for all files."""
        is_byte = np.zeros(tokenizer.vocab_size, dtype=bool)
        is_byte[tokenizer.byte_ids] = True
        return cls(tokenizer, is_byte, int(tokenizer.unk_token_id))


@dataclass
class FileCounts:
    """Everything counted in one file.

    The place of a row is its line or, where rows have none, its number: `unit` says which. Rows are
    those of training: a conversation is one for each answer. Keys of rows and prompts are digests:
    16 bytes of the prompt, then 16 of the answer for a row. Lengths are in tokens, control tokens
    not counted, one for each row used.
    """

    path: Path
    row_format: RowFormat
    unreadable: str | None = None  # why nothing of the file could be read
    unit: str = "line"
    decoded: DecodedText | None = None  # without the text; None: unreadable
    encoding_fault: str | None = None
    notes: list[str] = field(default_factory=list)
    layout: Layout | None = None  # None: what the columns mean cannot be told, see columns_fault
    columns_fault: str = ""
    has_answers: bool = True  # False: nothing to train on, only prompts to answer
    num_read: int = 0  # objects found, usable or not
    num_made: int = 0  # rows that they became
    columns: dict[str, int] = field(default_factory=dict)  # with the objects that fill them
    left_out: LeftOut | None = None
    # Rows left out, by the reason and whether the file asks for it (weight 0)
    lacking: dict[tuple[str, bool], list[int]] = field(default_factory=partial(defaultdict, list))
    places: dict[str, list[int]] = field(default_factory=partial(defaultdict, list))  # by kind
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=partial(defaultdict, list))
    words: dict[str, Counter[str]] = field(default_factory=partial(defaultdict, Counter))
    rows: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    prompts: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    contested: dict[bytes, list[int]] = field(default_factory=dict)  # prompt -> places
    prompt_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    answer_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_used(self) -> int:
        """Rows that training would use or, in a file without answers, that would be answered."""
        return len(self.prompt_lengths)

    @property
    def sides(self) -> list[Side]:
        """Prompts and answers; in a file without answers, those have no tokens."""
        return sides_of(self.row_format, self.prompt_lengths, self.answer_lengths)

    def add(self, kind: str, place: int, example: str | None = None) -> None:
        """Count one more of a kind; the first few examples in the order of the file are kept."""
        self.places[kind].append(place)
        if example is not None:
            kept = self.examples[kind]
            if len(kept) < MOST_EXAMPLES or place < kept[-1][0]:
                insort(kept, (place, example))
                del kept[MOST_EXAMPLES:]


@collector_paused()
def check_file(
    path: Path | str, encoder: Encoder, row_format: RowFormat, *, show_progress: bool = True
) -> FileCounts:
    """Read a whole file, faults and all, and count; nothing a file can hold raises an error."""
    counts = FileCounts(Path(path), row_format)
    try:
        file = open_data(counts.path)
    except DataError as error:
        counts.unreadable = str(error)
        return counts
    sources = _read(counts, file, show_progress)
    counts.layout = _find_layout(counts, sources)
    if counts.layout is None:
        return counts
    rows = _used_rows(counts, sources, counts.layout)
    lengths = []
    title = f"checking {counts.path.name}"
    with Progress(len(rows), title, visible=show_progress, leave=False) as progress:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            examples = [to_example(row, row_format) for row in chunk]
            for row, example in zip(chunk, examples, strict=True):
                _count_text(counts, row, example)
                _count_repeats(counts, row.line, example)
            lengths.append(_count_tokens(counts, chunk, examples, encoder))
            progress.update(len(chunk))
    if lengths:
        counts.prompt_lengths, counts.answer_lengths = np.concatenate(lengths).T
    _keep_spelled(counts.words["spelled_character"], encoder)
    return counts


def _read(counts: FileCounts, file: DataFile, show_progress: bool) -> list[RawRow]:
    """Return the rows as they stand; count the faults between them."""
    rows = []
    title = f"reading {counts.path.name}"
    with Progress(file.size, title, unit=file.unit, visible=show_progress, leave=False) as progress:
        for item in file.rows():
            if isinstance(item, DataError):
                counts.add("broken_row", item.line or 1, str(item))
            else:
                rows.append(item)
                if len(rows) % CHUNK_ROWS == 0:
                    progress.update(max(0, item.line - progress.done))
    counts.encoding_fault = say_encoding_fault(file.path, file.decoded, is_gzip=file.is_gzip)
    counts.decoded = file.decoded._replace(text="")
    counts.unit, counts.notes, counts.num_read = file.unit, file.notes, len(rows)
    names = dict.fromkeys(chain.from_iterable(row.columns for row in rows))
    filled = count_unused(rows, Layout("columns"))
    counts.columns = {name: filled.get(name, 0) for name in names}
    if not rows:
        _, first = counts.examples["broken_row"][0]
        counts.unreadable = f"{file.path}: no row can be read; the first fault is {first}"
    return rows


def _find_layout(counts: FileCounts, rows: list[RawRow]) -> Layout | None:
    """Return what the columns mean, with answers if they can be told; None if prompts cannot."""
    for needs_answers in (True, False) if rows else ():
        try:
            return find_layout(counts.path, rows, counts.row_format, needs_answers=needs_answers)
        except UnknownColumns as error:
            counts.columns_fault = str(error).removeprefix(f"{counts.path}: ")
    return None


def _used_rows(counts: FileCounts, sources: list[RawRow], layout: Layout) -> list[TextRow]:
    """Return the rows that training would use, in a file without answers those with a prompt.

    The others are counted, and so is what other columns hold.
    """
    made: list[tuple[TextRow, RawRow]] = []
    for source in sources:
        try:
            rows = to_text_rows(counts.path, source, layout, turns=counts.row_format.turns)
        except DataError as error:
            counts.add("broken_row", source.line, str(error))
        else:
            made += [(row, source) for row in rows]
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
            counts.lacking[reason, row.skipped is not None].append(row.line)
    rows = [row for row, _ in used]
    unused = count_unused(sources, layout)
    counts.left_out = find_left_out(rows, [source for _, source in used], unused, layout)
    return rows


def _count_text(counts: FileCounts, row: TextRow, example: Example) -> None:
    """Count what a row's text writes out, and an answer that its own history holds."""
    place, texts = row.line, (example.prompt, example.response)
    if may_have_marks(example.prompt) or may_have_marks(example.response):
        for kind, find in _FINDERS.items():
            names = dict.fromkeys(chain.from_iterable(map(find, texts)))  # each once, in order
            if names:
                counts.words[kind].update(names.keys())
                counts.add(kind, place)
        for kind, text in zip(("unknown_mark_prompt", "unknown_mark"), texts, strict=True):
            if UNKNOWN_MARK.search(text):
                counts.add(kind, place)
    is_ours = counts.decoded is not None and counts.decoded.damaged_lines  # our own U+FFFD
    if not is_ours and (REPLACEMENT in example.prompt or REPLACEMENT in example.response):
        counts.add("lost_character", place)
    missing = MISSING_WORDS.intersection((row.prompt, row.response))
    if missing:
        counts.add("missing_word", place, ", ".join(sorted(missing)))
    if row.history and counts.layout is not None and counts.layout.leaks(row):
        counts.add("leak", place)


def _count_repeats(counts: FileCounts, place: int, example: Example) -> None:
    """Find the row and its prompt among those before it."""
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
    counts: FileCounts, chunk: Sequence[TextRow], examples: Sequence[Example], encoder: Encoder
) -> np.ndarray:
    """Return (rows, 2) lengths of prompts and answers; add the characters of rows with bytes."""
    texts = [text for example in examples for text in (example.prompt, example.response)]
    encoded = encoder.tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    lengths = lengths.reshape(-1, 2)
    ends = np.cumsum(lengths.sum(axis=1))  # of each row in ids
    needed = lengths if counts.has_answers else lengths[:, :1]
    for kind, flags in (
        ("no_tokens", ~needed.all(axis=1)),
        ("unknown_token", _sums_between(ids == encoder.unknown_id, ends)),
        ("spelled_character", _sums_between(encoder.is_byte[ids], ends)),
    ):
        for index in np.flatnonzero(flags).tolist():
            counts.add(kind, chunk[index].line)
            if kind == "spelled_character":
                counts.words[kind].update("".join(texts[2 * index : 2 * index + 2]))
    return lengths


def _sums_between(flags: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the number of True in each of the consecutive parts of flags, some of them empty."""
    return np.diff(np.concatenate([[0], np.cumsum(flags)])[ends], prepend=0)


def _keep_spelled(characters: Counter[str], encoder: Encoder) -> None:
    """Keep the characters that the vocabulary writes as bytes."""
    names = list(characters)
    for name, ids in zip(names, encoder.tokenizer.encode_batch(names), strict=True):
        if not encoder.is_byte[ids].any():
            del characters[name]
