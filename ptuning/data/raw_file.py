"""The bytes of a data file to text: UTF-8, or what the bytes look like when they are not that.

Training takes UTF-8 alone. `python -m ptuning data check` reads GBK and UTF-16 too, so that such a
file is checked in one go and then converted. Bytes that fit GBK and Big5 are read as GBK; how they
read in both is shown, since only a reader can tell.
"""

import glob
import gzip
import json
import re
import shlex
import zlib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# Usual names of columns, most usual first, lower case.
PROMPT_NAMES = (
    *("content", "prompt", "question", "instruction", "query", "input"),
    *("问题", "提问", "指令", "输入"),
)
RESPONSE_NAMES = (
    *("summary", "response", "answer", "output", "completion", "target"),
    *("答案", "回答", "回复", "输出", "摘要"),
)
INPUT_NAMES = ("input", "context", "输入")  # what an instruction is about: Alpaca, Dolly
INSTRUCTION_NAMES = ("instruction", "指令")
HISTORY, SYSTEM, TOOLS = "history", "system", "tools"
CONVERSATION_NAMES = ("messages", "conversations")
LIMA_NAMES = ("conversations", "conversation")  # whose turns may be texts without a speaker
DIALOGUE_NAMES = ("conversation", "dialogue", "dialog", "paragraph", "turns")  # texts or turns
TURN_NAMES = (*CONVERSATION_NAMES, *DIALOGUE_NAMES, HISTORY)
TEXT_NAMES = (*PROMPT_NAMES, *RESPONSE_NAMES, *INPUT_NAMES)
# What a reader passes over, by kind, with the places: repeated headers and byte order marks.
Skipped = defaultdict[str, list[int]]
MARK = "\ufeff"
MARKS = "byte order mark"  # a kind of Skipped


class DataError(ValueError):
    """A fault in a data file; its text is `file:line: what is wrong, what is needed`."""

    def __init__(
        self, path: Path | str, line: int | None, message: str, unit: str = "line"
    ) -> None:
        """Keep the place next to the message; line is None if the whole file is meant.

        unit is "row" where line is the number of a row, from 1.
        """
        self.path = Path(path)
        self.line = line
        self.unit = unit
        self.message = message
        place = f"{path}"
        if line is not None:
            place += f":{line}" if unit == "line" else f", {unit} {line}"
        super().__init__(f"{place}: {message}")


class RawRow(NamedTuple):
    """One row: the line it begins on, and its columns.

    line is a row number, from 1, where unit is "row": rows there have no lines of their own.
    """

    line: int
    columns: dict[str, Any]
    unit: str = "line"

    def fault(self, path: Path | str, message: str) -> DataError:
        """Return the error for something wrong in this row."""
        return DataError(path, self.line, message, self.unit)


def shown(name: str) -> str:
    r"""Return a name of a column in quotes, on one line.

    >>> shown("a\nb")
    '"a\\nb"'
    """
    return json.dumps(name, ensure_ascii=False)


JSON_SUFFIXES = (".json", ".jsonl")
DELIMITED_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIX = ".txt"  # JSON or delimited fields
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"
_SUFFIXES = (*JSON_SUFFIXES, *DELIMITED_SUFFIXES, TEXT_SUFFIX, PARQUET_SUFFIX)
_GZIP_SUFFIX = ".gz"
_GZIP_MAGIC = b"\x1f\x8b"
_HEAD_BYTES = 512
_SAVE_SHEET = 'save the sheet as "CSV UTF-8" and give that file'

# (pattern of the first bytes, what the file is, what to do about it); {file} is its quoted path
_FOREIGN = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), noun, cure)
    for pattern, noun, cure in (
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
        (
            rb"version https://git-lfs",
            "a git-lfs pointer, not the data",
            "type: git lfs pull",
        ),
        (
            rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)\b",
            "a web page, not data",
            "download the raw file",
        ),
    )
]


class Contents(NamedTuple):
    """The bytes of a file, unpacked, and the ending that says how they are written."""

    content: bytes
    suffix: str
    is_gzip: bool


def read_contents(path: Path) -> Contents:
    """Read a whole file; DataError where it cannot be read or holds no rows of text."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == _GZIP_SUFFIX:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD_BYTES)
            _refuse_foreign(path, head)
            if suffix not in _SUFFIXES:
                raise DataError(path, None, _say_unknown(path, suffix))
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    is_gzip = head.startswith(_GZIP_MAGIC)
    if is_gzip:
        content = _unpack(path, content)
        if content.startswith(_GZIP_MAGIC):
            raise DataError(path, None, f"packed with gzip twice; type: gunzip {_quoted(path)}")
        _refuse_foreign(path, content[:_HEAD_BYTES])
    return Contents(content, suffix, is_gzip)


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the DataError for a file that the operating system does not let be read."""
    if path.is_dir():
        return DataError(
            path, None, f"cannot be read: it is a folder; give its files, such as '{path}/*.jsonl'."
        )
    if glob.has_magic(str(path)):
        return DataError(path, None, f"no file matches this pattern, seen from {Path.cwd()}.")
    return DataError(
        path,
        None,
        f"cannot be read ({error.strerror}) at {path.absolute()}; check the path and its "
        "permissions.",
    )


def _refuse_foreign(path: Path, head: bytes) -> None:
    for pattern, noun, cure in _FOREIGN:
        if pattern.match(head):
            raise DataError(path, None, f"{noun}; {cure.format(file=_quoted(path))}")


def _say_unknown(path: Path, suffix: str) -> str:
    known = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
    if path.suffix.lower() == _GZIP_SUFFIX:
        return (
            f"the ending {suffix or '(none)'} before .gz is unknown; use {known} there, as in "
            "rows.jsonl.gz."
        )
    return f"the ending {suffix or '(none)'} is unknown; use {known}, also with .gz behind it."


def _unpack(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        broken = "ends too early" if isinstance(error, EOFError) else f"is broken ({error})"
        raise DataError(
            path, None, f"packed with gzip, and the archive {broken}; download or copy it again."
        ) from error


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


UTF_8 = "UTF-8"
GBK = "GBK"
BIG5 = "Big5"
UTF_16 = "UTF-16"
WESTERN, _WESTERN_CODEC = "Windows-1252", "CP1252"
_CODECS = {UTF_8: "UTF-8", GBK: "GB18030", UTF_16: "UTF-16"}  # GB18030 holds all of GBK
# Big5 as Windows writes it, and with the characters of Hong Kong; Python and iconv name both so.
_CHINESE_CODECS = ((GBK, "GB18030"), (BIG5, "CP950"), (BIG5, "BIG5-HKSCS"))
_REPLACEMENT = "\ufffd"
_ASCII = bytes(range(128))
_MOST_LINES = 5  # damaged lines that are named
_SAMPLE = re.compile(r'[^\x00-\x7f][^\r\n"]{0,11}')  # the first foreign characters, and some more


class Reading(NamedTuple):
    """An encoding that the bytes fit, what iconv calls it, and how they begin when read so."""

    encoding: str
    codec: str
    sample: str = ""


class DecodedText(NamedTuple):
    """A file as text, how it was written, and where its bytes do not fit that.

    has_mark: it begins with a byte order mark, which is not part of text. damaged_lines: the first
    few lines with bytes that have no meaning in this encoding; there they stand as U+FFFD.
    first_foreign_line: the first line that is not UTF-8, None where all are. readings: the
    encodings other than UTF-8 that fit; text is the first, and nothing says which is meant.
    """

    text: str
    encoding: str  # UTF_8, GBK, BIG5, UTF_16 or WESTERN
    has_mark: bool
    damaged_lines: tuple[int, ...] = ()
    first_foreign_line: int | None = None
    readings: tuple[Reading, ...] = ()


def decode_text(content: bytes) -> DecodedText:
    r"""Find the encoding and decode; nothing is refused.

    >>> decode_text('{"a": "牛仔裤很宽松"}'.encode("gbk")).encoding
    'GBK'
    >>> decode_text(b'\xef\xbb\xbf{}')[:3]
    ('{}', 'UTF-8', True)
    """
    if _looks_like_utf_16(content):
        return _decode_utf_16(content)
    try:
        return DecodedText(content.decode("utf-8-sig"), UTF_8, content.startswith(b"\xef\xbb\xbf"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    utf_8 = content.decode("utf-8-sig", "replace")
    if _looks_western(content):
        text = content.decode(_WESTERN_CODEC, "replace")
        reading = Reading(WESTERN, _WESTERN_CODEC)
        return DecodedText(text, WESTERN, False, _lines_with(text), line, (reading,))
    if not _is_mostly_utf_8(utf_8) and not _has_utf_8_lines(content):
        text, readings = _read_chinese(content, utf_8.count(_REPLACEMENT))
        if readings:
            encoding = readings[0].encoding
            return DecodedText(text, encoding, False, _lines_with(text), line, readings)
    has_mark = content.startswith(b"\xef\xbb\xbf")
    return DecodedText(utf_8, UTF_8, has_mark, _lines_with(utf_8, line), line)


def _read_chinese(content: bytes, num_replaced: int) -> tuple[str, tuple[Reading, ...]]:
    """Return the encodings that lose fewest characters, and the text in the first of them.

    None fits where each loses a quarter of the num_replaced that UTF-8 does; a cut end loses one.
    """
    found: list[tuple[int, Reading, str]] = []
    for encoding, codec in _CHINESE_CODECS:
        text = content.decode(codec, "replace")
        begin = _SAMPLE.search(text)
        sample = "".join(one if one.isprintable() else "?" for one in begin[0]) if begin else ""
        found.append((text.count(_REPLACEMENT), Reading(encoding, codec, sample), text))
    fewest = min(lost for lost, _, _ in found)
    if fewest >= num_replaced / 4:
        return "", ()
    fitting: dict[str, tuple[Reading, str]] = {}  # the first codec of each encoding
    for lost, reading, text in found:
        if lost == fewest:
            fitting.setdefault(reading.encoding, (reading, text))
    readings = tuple(reading for reading, _ in fitting.values())
    return fitting[readings[0].encoding][1], readings


def say_encoding_fault(path: Path, decoded: DecodedText, *, is_gzip: bool) -> str | None:
    """Return why training refuses the file's encoding, with what to type; None for UTF-8."""
    if decoded.first_foreign_line is None:
        return None
    commands = [
        conversion_command(path, reading.codec, is_gzip=is_gzip) for reading in decoded.readings
    ]
    if not commands and not decoded.text.replace(_REPLACEMENT, "").isascii():
        return (
            "not UTF-8, though other lines are; mend these lines, or convert each part of the file "
            "to UTF-8 before joining them."
        )
    if not commands:
        return "not UTF-8, nor GBK, Big5 or UTF-16; save the file again as UTF-8."
    if len(commands) == 1:
        return f"not UTF-8; it looks like {decoded.encoding}. Convert it: {commands[0]}"
    samples = ", as ".join(f"{one.encoding} it reads “{one.sample}”" for one in decoded.readings)
    return (
        f"not UTF-8. As {samples}; convert it with the one that reads right: "
        f"{' or '.join(commands)}"
    )


def conversion_command(path: Path, encoding: str, *, is_gzip: bool = False) -> str:
    """Return what to type to write the file again as UTF-8, under a name that is free.

    >>> conversion_command(Path("train.json"), GBK)
    'iconv -f GB18030 -t UTF-8 train.json > train-utf8.json'
    >>> conversion_command(Path("train.json.gz"), GBK, is_gzip=True)
    'gzip -dc < train.json.gz | iconv -f GB18030 -t UTF-8 > train-utf8.json'
    """
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    target, number = Path(f"{plain.stem}-utf8{plain.suffix}"), 1
    while target.exists():
        number += 1
        target = Path(f"{plain.stem}-utf8-{number}{plain.suffix}")
    source, goal = shlex.quote(str(path)), shlex.quote(str(target))
    iconv = f"iconv -f {_CODECS.get(encoding, encoding)} -t UTF-8"
    return f"gzip -dc < {source} | {iconv} > {goal}" if is_gzip else f"{iconv} {source} > {goal}"


def _looks_like_utf_16(content: bytes) -> bool:
    """A mark says so; without one, every other byte of the ASCII that a row begins with is NUL."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    halves = {content[:4:2], content[1:4:2]}
    return len(halves) == 2 and b"\0\0" in halves


def _decode_utf_16(content: bytes) -> DecodedText:
    has_mark = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    big_endian = content.startswith(b"\xfe\xff") or content.startswith(b"\0")
    text = content.decode("utf-16-be" if big_endian else "utf-16-le", "replace")
    text = text.removeprefix("\ufeff")
    codec = "UTF-16" if has_mark else "UTF-16BE" if big_endian else "UTF-16LE"
    return DecodedText(text, UTF_16, has_mark, _lines_with(text), 1, (Reading(UTF_16, codec),))


def _is_mostly_utf_8(text: str) -> bool:
    """Say whether few characters were replaced.

    Text in GBK is valid UTF-8 in places: about one pair of its bytes in eight.
    """
    replaced = text.count(_REPLACEMENT)
    others = len(text) - len(text.encode("ascii", "ignore")) - replaced
    return others > 4 * replaced


def _looks_western(content: bytes) -> bool:
    """Say whether foreign bytes stand alone between ASCII: accents, quotes and dashes."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", content)]
    return sum(runs) < 1.5 * len(runs)


def _has_utf_8_lines(content: bytes) -> bool:
    """Say whether whole lines are UTF-8, as in files of two encodings joined.

    A line of GBK with three characters or more is valid UTF-8 by chance in one case of sixty.
    """
    valid = foreign = 0
    for line in content.split(b"\n"):
        if len(line.translate(None, _ASCII)) >= 6:
            foreign += 1
            with suppress(UnicodeDecodeError):
                line.decode("utf-8")
                valid += 1
    return valid > 0.05 * foreign


def _lines_with(text: str, first_line: int = 1) -> tuple[int, ...]:
    """Return the first few lines with a replaced character; none lie before first_line."""
    lines: list[int] = []
    index, line, counted = 0, 1, 0
    while len(lines) < _MOST_LINES and (index := text.find(_REPLACEMENT, index)) >= 0:
        line += text.count("\n", counted, index)
        counted = index
        if line >= first_line:
            lines.append(line)
        end = text.find("\n", index)
        index = end if end >= 0 else len(text)
    return tuple(lines)
