"""Step 1a of 5: a data file to its text, or to an error that says what the file is instead.

The first bytes decide what a file is, not its name: downloads often have the wrong extension.
Training accepts only UTF-8. `python -m ptuning data check` also reads the other encodings, so that
one run finds every fault. Many files are valid GBK and valid Big5; the error shows both readings,
since only a reader can tell which one is right.
"""

import glob
import gzip
import json
import re
import shlex
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

DELIMITED_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIX = ".txt"  # JSON or delimited fields
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"
_SUFFIXES = (".json", ".jsonl", *DELIMITED_SUFFIXES, TEXT_SUFFIX, PARQUET_SUFFIX)
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 512
_SAVE_SHEET = 'save the sheet as "CSV UTF-8" and give that file'
# (pattern of the first bytes, what the file is, what to do about it); {file} is its quoted path
_FOREIGN = (
    (
        rb"PK\x03\x04.{26,60}(\[Content_Types\]|docProps/|xl/|_rels/|mimetypeapplication/vnd)",
        "an Office file",
        _SAVE_SHEET,
    ),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "type: unzip {file}"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file of the old kind", _SAVE_SHEET),
    (rb"BZh[1-9]1AY&SY", "packed with bzip2", "type: bzip2 -dk {file}"),
    (rb"\xfd7zXZ\x00", "packed with xz", "type: xz -dk {file}"),
    (rb"\x28\xb5\x2f\xfd", "packed with zstd", "type: zstd -d {file}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "type: 7z x {file}"),
    (rb"Rar!\x1a\x07", "a rar archive", "type: unrar x {file}"),
    (rb".{257}ustar", "a tar archive", "type: tar xf {file}"),
    (rb"%PDF-", "a PDF", "give the table that it was made from"),
    (rb"version https://git-lfs", "a git-lfs pointer, not the data", "type: git lfs pull"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)\b",
        "a web page, not data",
        "download the raw file",
    ),
)

UTF_8, UTF_16, GBK, BIG5, WESTERN = "UTF-8", "UTF-16", "GBK", "Big5", "Windows-1252"
# Codec names that both Python and iconv know. GB18030 is a superset of GBK; CP950 is Big5 as
# Windows writes it, BIG5-HKSCS adds the characters of Hong Kong.
_CHINESE_CODECS = ((GBK, "GB18030"), (BIG5, "CP950"), (BIG5, "BIG5-HKSCS"))
_WESTERN_CODEC = "CP1252"
_REPLACEMENT = "\ufffd"
_MAX_DAMAGED_LINES = 5
_SAMPLE = re.compile(r'[^\x00-\x7f][^\r\n"]{0,11}')  # the first foreign characters, and some more

BOM = "\ufeff"
BOM_NAME = "byte order mark"  # a key of Skipped
MAX_PLACES = 5  # named for one reason
Skipped = defaultdict[str, list[int]]  # what a reader skips, with the places


class DataError(ValueError):
    """A fault in a data file; its text is `file:line: what is wrong, what is needed`.

    `line` is None if the whole file is meant, and a row number from 1 where `unit` is "row".
    """

    def __init__(
        self, path: Path | str, line: int | None, message: str, unit: str = "line"
    ) -> None:
        """Keep the parts next to the text."""
        self.path, self.line, self.message, self.unit = Path(path), line, message, unit
        place = "" if line is None else f":{line}" if unit == "line" else f", {unit} {line}"
        super().__init__(f"{path}{place}: {message}")


class RawRow(NamedTuple):
    """One row as it is in a file: the line it begins on, and its columns.

    `line` is a row number from 1 where `unit` is "row": such rows do not begin on lines of their
    own.
    """

    path: Path
    line: int
    columns: dict[str, Any]
    unit: str = "line"

    def fault(self, message: str) -> DataError:
        """Return the error for a fault in this row."""
        return DataError(self.path, self.line, message, self.unit)


def quoted(name: str) -> str:
    r"""Return a column name in quotes, on one line.

    >>> quoted("a\nb")
    '"a\\nb"'
    """
    return json.dumps(name, ensure_ascii=False)


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> number_of(1, "row"), number_of(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def as_places(places: Sequence[int], unit: str, most: int | None = MAX_PLACES) -> str:
    """Name places, consecutive ones as a range; most None names all.

    >>> as_places([2, 5, 6, 7, 9], "line"), as_places([3], "row")
    ('lines 2, 5-7, 9', 'row 3')
    """
    ranges: list[list[int]] = []
    for place in places:
        if ranges and place <= ranges[-1][1] + 1:
            ranges[-1][1] = place
        else:
            ranges.append([place, place])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = ", ..." if most is not None and len(words) > most else ""
    plural = "" if words[0].isdigit() and len(words) == 1 else "s"
    return f"{unit}{plural} {', '.join(words[:most])}{more}"


# Bytes


def read_contents(path: Path) -> tuple[bytes, str, bool]:
    """Return a file's bytes, its suffix without .gz, and whether gzip was unpacked.

    DataError if the file cannot be read, is of a known other kind or has an unknown suffix.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    before_gz = " before .gz" if suffixes[-1:] == [".gz"] else ""
    if before_gz:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD_BYTES)
            _refuse_foreign(path, head)
            if suffix not in _SUFFIXES:
                known = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
                example = "there, as in rows.jsonl.gz" if before_gz else "also with .gz behind it"
                raise DataError(
                    path,
                    None,
                    f"the ending {suffix or '(none)'}{before_gz} is unknown; use {known}, "
                    f"{example}.",
                )
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    if not head.startswith(_GZIP_MAGIC):
        return content, suffix, False
    try:
        content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        broken = "ends too early" if isinstance(error, EOFError) else f"is broken ({error})"
        raise DataError(
            path, None, f"packed with gzip, and the archive {broken}; download or copy it again."
        ) from error
    if content.startswith(_GZIP_MAGIC):
        raise DataError(
            path, None, f"packed with gzip twice; type: gunzip {shlex.quote(str(path))}"
        )
    _refuse_foreign(path, content[:_HEAD_BYTES])
    return content, suffix, True


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the DataError for a file that the operating system cannot open."""
    if path.is_dir():
        message = f"cannot be read: it is a folder; give its files, such as '{path}/*.jsonl'."
    elif glob.has_magic(str(path)):
        message = f"no file matches this pattern, seen from {Path.cwd()}."
    else:
        message = (
            f"cannot be read ({error.strerror}) at {path.absolute()}; check the path and its "
            "permissions."
        )
    return DataError(path, None, message)


def _refuse_foreign(path: Path, head: bytes) -> None:
    for pattern, noun, cure in _FOREIGN:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            cure = cure.format(file=shlex.quote(str(path)))
            raise DataError(path, None, f"{noun}; {cure}")


# Encodings


class Reading(NamedTuple):
    """An encoding that fits the bytes, its name for iconv, and how the foreign text begins."""

    encoding: str
    codec: str
    sample: str = ""


class DecodedText(NamedTuple):
    """A file's text without its byte order mark, and how it was encoded.

    damaged_lines: the first few lines with undecodable bytes, which became U+FFFD.
    first_foreign_line: the first line that is not UTF-8; None if all are.
    readings: the encodings other than UTF-8 that fit; `text` is the first of them.
    """

    text: str
    has_mark: bool
    damaged_lines: tuple[int, ...] = ()
    first_foreign_line: int | None = None
    readings: tuple[Reading, ...] = ()

    @property
    def encoding(self) -> str:
        """UTF_8, UTF_16, GBK, BIG5 or WESTERN."""
        return self.readings[0].encoding if self.readings else UTF_8


def decode_text(content: bytes) -> DecodedText:
    r"""Detect the encoding and decode; nothing is refused.

    >>> decode_text('{"a": "牛仔裤很宽松"}'.encode("gbk")).encoding
    'GBK'
    >>> decode_text(b'\xef\xbb\xbf{}')[:2]
    ('{}', True)
    """
    utf_16 = _decode_utf_16(content)
    if utf_16 is not None:
        return utf_16
    has_mark = content.startswith(BOM.encode("utf-8"))
    try:
        return DecodedText(content.decode("utf-8-sig"), has_mark)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    utf_8 = content.decode("utf-8-sig", "replace")
    if _looks_western(content):
        text = content.decode(_WESTERN_CODEC, "replace")
        reading = Reading(WESTERN, _WESTERN_CODEC)
        return DecodedText(text, False, _damaged_lines(text), line, (reading,))
    if not _is_mostly_utf_8(utf_8) and not _has_utf_8_lines(content):
        text, readings = _decode_chinese(content, utf_8.count(_REPLACEMENT))
        if readings:
            return DecodedText(text, False, _damaged_lines(text), line, readings)
    return DecodedText(utf_8, has_mark, _damaged_lines(utf_8, line), line)


def _decode_utf_16(content: bytes) -> DecodedText | None:
    """Decode text with a mark, or whose first two characters are ASCII: every other byte is NUL."""
    has_mark = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    halves = {content[:4:2], content[1:4:2]}
    if not has_mark and not (len(halves) == 2 and b"\0\0" in halves):
        return None
    codec = "UTF-16BE" if content.startswith((b"\xfe\xff", b"\0")) else "UTF-16LE"
    text = content.decode(codec, "replace").removeprefix(BOM)
    reading = Reading(UTF_16, "UTF-16" if has_mark else codec)
    return DecodedText(text, has_mark, _damaged_lines(text), 1, (reading,))


def _decode_chinese(content: bytes, num_replaced: int) -> tuple[str, tuple[Reading, ...]]:
    """Return the text in the encoding that loses fewest characters, and all that lose as few.

    None fits where each loses a quarter of the num_replaced that UTF-8 does; a cut end loses one.
    """
    texts = {codec: content.decode(codec, "replace") for _, codec in _CHINESE_CODECS}
    losses = {codec: text.count(_REPLACEMENT) for codec, text in texts.items()}
    fewest = min(losses.values())
    if fewest >= num_replaced / 4:
        return "", ()
    fitting: dict[str, Reading] = {}  # by encoding, with its first codec
    for encoding, codec in _CHINESE_CODECS:
        if losses[codec] == fewest and encoding not in fitting:
            begin = _SAMPLE.search(texts[codec])
            sample = "".join(one if one.isprintable() else "?" for one in begin[0]) if begin else ""
            fitting[encoding] = Reading(encoding, codec, sample)
    readings = tuple(fitting.values())
    return texts[readings[0].codec], readings


def _is_mostly_utf_8(text: str) -> bool:
    """Return whether few characters were replaced; 1 in 8 byte pairs of GBK is valid UTF-8."""
    num_replaced = text.count(_REPLACEMENT)
    num_others = len(text) - len(text.encode("ascii", "ignore")) - num_replaced
    return num_others > 4 * num_replaced


def _looks_western(content: bytes) -> bool:
    """Return whether foreign bytes stand alone between ASCII: accents, quotes and dashes."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", content)]
    return sum(runs) < 1.5 * len(runs)


def _has_utf_8_lines(content: bytes) -> bool:
    """Return whether whole lines are UTF-8, as in files of two encodings joined.

    A line of GBK with three or more characters is valid UTF-8 by chance in 1 of 60 cases.
    """
    num_valid = num_foreign = 0
    for line in content.split(b"\n"):
        if len(line.translate(None, bytes(range(128)))) >= 6:
            num_foreign += 1
            with suppress(UnicodeDecodeError):
                line.decode("utf-8")
                num_valid += 1
    return num_valid > 0.05 * num_foreign


def _damaged_lines(text: str, first_line: int = 1) -> tuple[int, ...]:
    """Return the first few lines from first_line on that contain U+FFFD."""
    lines = enumerate(text.split("\n"), start=1)
    damaged = (line for line, part in lines if _REPLACEMENT in part and line >= first_line)
    return tuple(islice(damaged, _MAX_DAMAGED_LINES))


def find_encoding_fault(path: Path, decoded: DecodedText, *, is_gzip: bool) -> DataError | None:
    """Return why training refuses the encoding, with what to type; None for UTF-8."""
    if decoded.first_foreign_line is None:
        return None
    commands = [
        conversion_command(path, reading.codec, is_gzip=is_gzip) for reading in decoded.readings
    ]
    if not commands and not decoded.text.replace(_REPLACEMENT, "").isascii():
        message = (
            "not UTF-8, though other lines are; fix these lines, or convert each part of the file "
            "to UTF-8 before joining them."
        )
    elif not commands:
        message = "not UTF-8, nor GBK, Big5 or UTF-16; save the file again as UTF-8."
    elif len(commands) == 1:
        message = f"not UTF-8; it looks like {decoded.encoding}. Convert it: {commands[0]}"
    else:
        samples = (f"{one.encoding} it reads “{one.sample}”" for one in decoded.readings)
        message = (
            f"not UTF-8. As {', as '.join(samples)}; convert it with the one that reads right: "
            f"{' or '.join(commands)}"
        )
    return DataError(path, decoded.first_foreign_line, message)


def conversion_command(path: Path, codec: str, *, is_gzip: bool = False) -> str:
    """Return the shell command that writes the file as UTF-8 under a name that is free.

    >>> conversion_command(Path("train.json"), "GB18030")
    'iconv -f GB18030 -t UTF-8 train.json > train-utf8.json'
    >>> conversion_command(Path("train.json.gz"), "GB18030", is_gzip=True)
    'gzip -dc < train.json.gz | iconv -f GB18030 -t UTF-8 > train-utf8.json'
    """
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    target, number = Path(f"{plain.stem}-utf8{plain.suffix}"), 1
    while target.exists():
        number += 1
        target = Path(f"{plain.stem}-utf8-{number}{plain.suffix}")
    source, goal = shlex.quote(str(path)), shlex.quote(str(target))
    iconv = f"iconv -f {codec} -t UTF-8"
    return f"gzip -dc < {source} | {iconv} > {goal}" if is_gzip else f"{iconv} {source} > {goal}"
