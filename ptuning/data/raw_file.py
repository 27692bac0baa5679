"""The bytes of a data file to text: UTF-8, or what the bytes look like when they are not that.

Training takes UTF-8 alone. `python -m ptuning data check` reads GBK and UTF-16 too, so that such a
file is checked in one go and then converted. Bytes that fit GBK and Big5 are read as GBK; how they
read in both is shown, since only a reader can tell.
"""

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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
