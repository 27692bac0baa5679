"""The bytes of a data file to text: UTF-8, or what the bytes look like when they are not that.

Training takes UTF-8 alone. `python -m ptuning data check` reads GBK and UTF-16 too, so that such a
file is checked in one go and then converted.
"""

import shlex
from pathlib import Path
from typing import NamedTuple

UTF_8 = "UTF-8"
GBK = "GBK"
UTF_16 = "UTF-16"
_CODECS = {UTF_8: "UTF-8", GBK: "GB18030", UTF_16: "UTF-16"}  # GB18030 holds all of GBK
_REPLACEMENT = "\ufffd"
_MOST_LINES = 5  # damaged lines that are named


class DecodedText(NamedTuple):
    """A file as text, how it was written, and where its bytes do not fit that.

    has_mark: it begins with a byte order mark, which is not part of text. damaged_lines: the first
    few lines with bytes that have no meaning in this encoding; there they stand as U+FFFD.
    first_foreign_line: the first line that is not UTF-8, None where all are.
    """

    text: str
    encoding: str  # UTF_8, GBK or UTF_16
    has_mark: bool
    damaged_lines: tuple[int, ...] = ()
    first_foreign_line: int | None = None


def decode_text(content: bytes) -> DecodedText:
    r"""Find the encoding and decode; nothing is refused.

    >>> decode_text('{"a": "裤子"}'.encode("gbk")).encoding
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
    if not _is_mostly_utf_8(utf_8):
        gbk = content.decode("gb18030", "replace")
        if gbk.count(_REPLACEMENT) < utf_8.count(_REPLACEMENT) / 4:  # a cut end has one
            return DecodedText(gbk, GBK, False, _lines_with(gbk), line)
    has_mark = content.startswith(b"\xef\xbb\xbf")
    return DecodedText(utf_8, UTF_8, has_mark, _lines_with(utf_8, line), line)


def conversion_command(path: Path, encoding: str) -> str:
    """Return what to type to write the file again as UTF-8.

    >>> conversion_command(Path("train.json"), GBK)
    'iconv -f GB18030 -t UTF-8 train.json > train-utf8.json'
    """
    target = shlex.quote(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {_CODECS[encoding]} -t UTF-8 {shlex.quote(str(path))} > {target}"


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
    return DecodedText(text, UTF_16, has_mark, _lines_with(text), 1)


def _is_mostly_utf_8(text: str) -> bool:
    """Say whether few characters were replaced.

    Text in GBK is valid UTF-8 in places: about one pair of its bytes in eight.
    """
    replaced = text.count(_REPLACEMENT)
    others = len(text) - len(text.encode("ascii", "ignore")) - replaced
    return others > 4 * replaced


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
