"""One pass over a data file that counts what `python -m ptuning data check` reports.

Rows are read as training reads them and encoded in parts, so that memory holds the file's text, a
digest and two lengths for each row, and never all tokens.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ptuning.data.check_counts import MOST_EXAMPLES, Columns, FileCounts, Tally
from ptuning.data.formatting import Example, to_example
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
        is_byte[[index for name, index in tokenizer.get_vocab().items() if is_byte_piece(name)]] = (
            True
        )
        return cls(tokenizer, is_byte, int(tokenizer.unk_token_id))


def check_file(
    path: Path | str, encoder: Encoder, columns: Columns, *, show_progress: bool = True
) -> FileCounts:
    """Read a whole file, faults and all, and count; nothing a file can hold raises an error."""
    path = Path(path)
    counts = FileCounts(path, columns)
    try:
        decoded = read_text(path)
    except DataError as error:
        counts.unreadable = str(error)
        return counts
    counts.encoding, counts.has_mark = decoded.encoding, decoded.has_mark
    counts.damaged_lines = decoded.damaged_lines
    lengths = []
    characters: Counter[str] = Counter()
    rows = _used_rows(counts, decoded.text, show_progress)
    for chunk in _in_chunks(rows):
        lengths.append(_count_tokens(counts, chunk, encoder, characters))
    if lengths:
        counts.prompt_lengths, counts.answer_lengths = np.concatenate(lengths).T
    counts.spelled_characters = _only_spelled(characters, encoder)
    if not counts.num_read:
        counts.unreadable = (
            f"{path}: no row can be read; the first fault is {counts.broken_messages[0]}"
            if counts.broken.count
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
        _add_broken(counts, item, place)
        return None
    counts.num_read += 1
    counts.column_rows.update(list(item.columns))
    names: dict[str, Any] = {
        "prompt_column": counts.columns.prompt,
        "response_column": counts.columns.response,
        "history_column": counts.columns.history,
    }
    try:
        fields = to_fields(counts.path, item, **names)
    except DataError as error:
        _add_broken(counts, error, place)
        return None
    if fields.empty is not None:
        counts.empty.setdefault(fields.empty, Tally()).add(place)
        return None
    example = to_example(fields.columns, **names)
    _count_text(counts, place, example)
    _count_repeats(counts, place, example)
    return example


def _add_broken(counts: FileCounts, error: DataError, place: int) -> None:
    counts.broken.add(place)
    if len(counts.broken_messages) < MOST_EXAMPLES:
        counts.broken_messages.append(str(error))


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
    names = {*find_control_names(example.prompt), *find_control_names(example.response)}
    for name in names:
        counts.control_names.setdefault(name, Tally()).add(place)
    if names:
        counts.control_rows.add(place)
    if _UNKNOWN_MARK.search(example.prompt):
        counts.unknown_prompts.add(place)
    if _UNKNOWN_MARK.search(example.response):
        counts.unknown_answers.add(place)
    if REPLACEMENT in example.prompt + example.response:
        counts.lost_characters.add(place)


def _count_repeats(counts: FileCounts, place: int, example: Example) -> None:
    """Find the row and its prompt among those before it."""
    prompt = _digest(example.prompt)
    row = prompt + _digest(example.response)
    if row in counts.rows:
        counts.duplicates.add(place)
        if len(counts.duplicate_pairs) < MOST_EXAMPLES:
            counts.duplicate_pairs.append((place, counts.rows[row]))
        return
    counts.rows[row] = place
    if prompt in counts.prompts:
        counts.contested.setdefault(prompt, [counts.prompts[prompt]]).append(place)
    else:
        counts.prompts[prompt] = place


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def _in_chunks(rows: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _count_tokens(
    counts: FileCounts,
    chunk: list[tuple[int, Example]],
    encoder: Encoder,
    characters: Counter[str],
) -> np.ndarray:
    """Return (rows, 2) lengths of prompts and answers; add the characters of rows with bytes."""
    texts = [text for _, example in chunk for text in (example.prompt, example.response)]
    encoded = encoder.tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    num_bytes = _sums_within(encoder.is_byte[ids], lengths).reshape(-1, 2)
    num_unknown = _sums_within(ids == encoder.unknown_id, lengths).reshape(-1, 2).sum(axis=1)
    lengths = lengths.reshape(-1, 2)
    for index, (place, example) in enumerate(chunk):
        if not lengths[index].all():
            counts.invisible.add(place)
        if num_unknown[index]:
            counts.unknown_ids.add(place)
        if num_bytes[index].any():
            counts.spelled_rows.add(place)
            characters.update(example.prompt)
            characters.update(example.response)
    return lengths


def _sums_within(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the number of True in each part of flags; the parts have these lengths, 0 included."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    ends = np.cumsum(lengths)
    return sums[ends] - sums[ends - lengths]


def _only_spelled(characters: Counter[str], encoder: Encoder) -> Counter[str]:
    """Keep the characters that the vocabulary writes as bytes."""
    names = list(characters)
    encoded = encoder.tokenizer.encode_batch(names)
    return Counter(
        {
            name: characters[name]
            for name, ids in zip(names, encoded, strict=True)
            if encoder.is_byte[ids].any()
        }
    )
