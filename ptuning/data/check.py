"""One pass over a data file that counts what `python -m ptuning data check` reports.

Rows are read as training reads them and encoded in chunks, so that memory holds the file's text, a
digest and two lengths for each row, and never all tokens.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from ptuning.data.check_findings import MOST_EXAMPLES
from ptuning.data.formatting import Example, RowFormat, to_example
from ptuning.data.parsing import DataError, Row, iterate_rows
from ptuning.data.reading import read_text, to_fields
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.data.vocabulary import LEADING_PIECES, TRAILING_PIECES, is_byte_piece
from ptuning.output import Progress

CHUNK_ROWS = 1000  # rows encoded between two steps of the progress bar
DIGEST_BYTES = 16
REPLACEMENT = "\ufffd"  # what editors write in place of a character that they could not read
_NAMED = "|".join(
    re.escape(piece) for piece in sorted({*LEADING_PIECES, *TRAILING_PIECES}, key=len, reverse=True)
)
# Control tokens written out. Here they are encoded as plain text, but `<n>`, `<|tab|>` and
# `<|blank_k|>` come back as whitespace, and other programs, the published code among them, read
# control tokens out of them. The names of this vocabulary; image tokens of its older release and
# bytes; the form <|...|> of this and later models.
_CONTROL_NAME = re.compile(
    rf"{_NAMED}|<image_\d+>|<0x[0-9A-F]{{2}}>|<\|[A-Za-z][\w .:-]{{0,38}}\|>", re.ASCII
)
_UNKNOWN_MARK = re.compile(r"<UNK>|\[UNK\]", re.IGNORECASE)  # in 30 % of ADGEN's answers
_FULL_WIDTH = re.compile("[＜［]")


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
        byte_ids = [index for name, index in tokenizer.get_vocab().items() if is_byte_piece(name)]
        is_byte[byte_ids] = True
        return cls(tokenizer, is_byte, int(tokenizer.unk_token_id))


@dataclass
class Tally:
    """How often something was found, and the first few places, with what was there."""

    count: int = 0
    places: list[int] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, place: int, example: str | None = None) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < MOST_EXAMPLES:
            self.places.append(place)
            if example is not None:
                self.examples.append(example)


@dataclass
class FileCounts:
    """Everything counted in one file.

    The place of a row is its line or, if the whole file is one line, its number among the rows.
    Keys of rows and prompts are digests: 16 bytes of the prompt, then 16 of the answer for a row.
    Lengths are in tokens, control tokens not counted, one for each row that training would use.
    """

    path: Path
    row_format: RowFormat
    unreadable: str | None = None  # why nothing of the file could be read
    encoding: str = ""
    has_mark: bool = False
    has_lines: bool = True
    damaged_lines: tuple[int, ...] = ()
    num_read: int = 0  # objects found, usable or not
    column_rows: Counter[str] = field(default_factory=Counter)  # rows that have a column
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))  # by kind
    empty: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))  # by column
    control_names: Counter[str] = field(default_factory=Counter)  # rows that write one out
    spelled_characters: Counter[str] = field(default_factory=Counter)  # those written as bytes
    rows: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    prompts: dict[bytes, int] = field(default_factory=dict)  # key -> first place
    contested: dict[bytes, list[int]] = field(default_factory=dict)  # prompt -> places
    prompt_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    answer_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def place_name(self) -> str:
        """What a place counts: lines, or rows of a file of one line."""
        return "line" if self.has_lines else "row"

    @property
    def num_used(self) -> int:
        """Rows that training would use."""
        return len(self.prompt_lengths)

    @property
    def num_broken(self) -> int:
        """Rows that stop training."""
        return self.tallies["broken_row"].count if "broken_row" in self.tallies else 0

    def missing_columns(self) -> dict[str, str]:
        """Return the named columns that no row has, by flag."""
        columns = self.row_format.columns.items()
        return {flag: column for flag, column in columns if column not in self.column_rows}


def check_file(
    path: Path | str, encoder: Encoder, row_format: RowFormat, *, show_progress: bool = True
) -> FileCounts:
    """Read a whole file, faults and all, and count; nothing a file can hold raises an error."""
    path = Path(path)
    counts = FileCounts(path, row_format)
    try:
        decoded = read_text(path)
    except DataError as error:
        counts.unreadable = str(error)
        return counts
    counts.encoding, counts.has_mark = decoded.encoding, decoded.has_mark
    counts.damaged_lines = decoded.damaged_lines
    lengths = []
    rows = _used_rows(counts, decoded.text, show_progress)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        lengths.append(_count_tokens(counts, chunk, encoder))
    if lengths:
        counts.prompt_lengths, counts.answer_lengths = np.concatenate(lengths).T
    _keep_spelled(counts.spelled_characters, encoder)
    if not counts.num_read:
        broken = counts.tallies["broken_row"].examples
        counts.unreadable = (
            f"{path}: no row can be read; the first fault is {broken[0]}"
            if broken
            else f"{path}: no rows; write one JSON object per line, or a JSON array."
        )
    return counts


def _used_rows(counts: FileCounts, text: str, show_progress: bool) -> Iterator[tuple[int, Example]]:
    """Yield the place and the example of each row that training would use; count the others."""
    num_lines = text.count("\n") + 1
    counts.has_lines = num_lines > 1
    with Progress(
        num_lines if counts.has_lines else None,
        f"checking {counts.path.name}",
        unit=counts.place_name,
        visible=show_progress,
        leave=False,
    ) as progress:
        for number, item in enumerate(iterate_rows(counts.path, text), start=1):
            place = (item.line or 1) if counts.has_lines else number
            example = _to_used_example(counts, item, place)
            if example is not None:
                yield place, example
            progress.update(max(0, place - progress.done))


def _to_used_example(counts: FileCounts, item: Row | DataError, place: int) -> Example | None:
    """Count one row or fault of a file; None where training would not use it."""
    if isinstance(item, DataError):
        counts.tallies["broken_row"].add(place, str(item))
        return None
    counts.num_read += 1
    counts.column_rows.update(list(item.columns))
    try:
        columns, empty = to_fields(counts.path, item, counts.row_format)
    except DataError as error:
        counts.tallies["broken_row"].add(place, str(error))
        return None
    if empty is not None:
        counts.empty[empty].add(place)
        return None
    example = to_example(columns, counts.row_format)
    _count_text(counts, place, example)
    _count_repeats(counts, place, example)
    return example


def find_control_names(text: str) -> list[str]:
    """Return every control token written out in a text, in order; full-width forms count.

    >>> find_control_names("好<eop>的＜sop＞ x < y [0]")
    ['<eop>', '<sop>']
    """
    if _FULL_WIDTH.search(text):
        text = unicodedata.normalize("NFKC", text)  # as SentencePiece does after any search
    if "<" not in text and "[" not in text:
        return []
    return _CONTROL_NAME.findall(text)


def _count_text(counts: FileCounts, place: int, example: Example) -> None:
    """Count what a row's text writes out."""
    found = find_control_names(example.prompt) + find_control_names(example.response)
    names = list(dict.fromkeys(found))  # each once, in order
    if names:
        counts.control_names.update(names)
        counts.tallies["control_text"].add(place)
    if _UNKNOWN_MARK.search(example.prompt):
        counts.tallies["unknown_mark_prompt"].add(place)
    if _UNKNOWN_MARK.search(example.response):
        counts.tallies["unknown_mark"].add(place)
    if REPLACEMENT in example.prompt + example.response:
        counts.tallies["lost_character"].add(place)


def _count_repeats(counts: FileCounts, place: int, example: Example) -> None:
    """Find the row and its prompt among those before it."""
    prompt = _digest(example.prompt)
    row = prompt + _digest(example.response)
    if row in counts.rows:
        name = counts.place_name
        counts.tallies["duplicate_row"].add(place, f"{name} {place} = {name} {counts.rows[row]}")
        return
    counts.rows[row] = place
    if prompt in counts.prompts:
        counts.contested.setdefault(prompt, [counts.prompts[prompt]]).append(place)
    else:
        counts.prompts[prompt] = place


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def _count_tokens(
    counts: FileCounts, chunk: list[tuple[int, Example]], encoder: Encoder
) -> np.ndarray:
    """Return (rows, 2) lengths of prompts and answers; add the characters of rows with bytes."""
    texts = [text for _, example in chunk for text in (example.prompt, example.response)]
    encoded = encoder.tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    lengths = lengths.reshape(-1, 2)
    ends = np.cumsum(lengths.sum(axis=1))  # of each row in ids
    num_bytes = _sums_between(encoder.is_byte[ids], ends)
    num_unknown = _sums_between(ids == encoder.unknown_id, ends)
    for index, (place, example) in enumerate(chunk):
        if not lengths[index].all():
            counts.tallies["no_tokens"].add(place)
        if num_unknown[index]:
            counts.tallies["unknown_token"].add(place)
        if num_bytes[index]:
            counts.tallies["spelled_character"].add(place)
            counts.spelled_characters.update(example.prompt + example.response)
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
