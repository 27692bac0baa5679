"""Which encoding the bytes of a file are in, and where they are damaged."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ptuning.data.raw_file import (
    BIG5,
    GBK,
    UTF_8,
    UTF_16,
    WESTERN,
    conversion_command,
    decode_text,
)

ROW = '{"content": "类型#裤*版型#宽松", "summary": "宽松的裤子，很好看"}\n'


def test_one_bad_byte_does_not_make_utf_8_something_else() -> None:
    """GB18030 can decode some such files, into other characters."""
    for cut in range(1, 3):
        content = (ROW * 3).encode("utf-8") + "裤".encode()[:cut] + b'a"}\n' + ROW.encode("utf-8")
        decoded = decode_text(content)
        assert decoded.encoding == UTF_8
        assert (decoded.damaged_lines, decoded.first_foreign_line) == ((4,), 4)
        assert decoded.text.count(ROW) == 4


def test_gbk_that_is_cut_in_a_character_is_still_gbk() -> None:
    decoded = decode_text((ROW * 3).encode("gbk") + "裤".encode("gbk")[:1])
    assert (decoded.encoding, decoded.damaged_lines) == (GBK, (4,))


def test_only_the_first_damaged_lines_are_named() -> None:
    decoded = decode_text(ROW.encode("utf-8") + b"\xff \xff\n" * 9)
    assert decoded.damaged_lines == (2, 3, 4, 5, 6)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_needs_no_mark(codec: str) -> None:
    decoded = decode_text(ROW.encode(codec))
    assert (decoded.encoding, decoded.text) == (UTF_16, ROW)


@given(st.text())
def test_utf_8_is_never_taken_for_something_else(text: str) -> None:
    content = ROW.encode("utf-8") + text.encode("utf-8", "replace")
    decoded = decode_text(content)
    assert decoded == (content.decode("utf-8"), False, (), None, ())


@given(st.text(st.characters(codec="gbk", min_codepoint=0x4E00), min_size=1))
def test_chinese_rows_in_gbk_are_recognised(text: str) -> None:
    last_line = text.encode("gbk").decode("utf-8", "replace")
    assume("\ufffd" in last_line)  # a short line can be valid UTF-8 by chance, such as 一一一
    decoded = decode_text((ROW + text).encode("gbk"))
    assert (decoded.encoding, decoded.text) == (GBK, ROW + text)


@given(st.binary())
def test_any_bytes_are_text(content: bytes) -> None:
    decoded = decode_text(content)
    assert decoded.encoding in {UTF_8, GBK, BIG5, UTF_16, WESTERN}
    assert len(decoded.damaged_lines) <= 5
    assert decoded.damaged_lines == tuple(sorted(set(decoded.damaged_lines)))
    decoded.text.encode("utf-8")


@pytest.mark.parametrize("codec", ["GB18030", "UTF-16"])
def test_the_command_converts(tmp_path: Path, codec: str) -> None:
    source = tmp_path / "my data.json"
    source.write_bytes(ROW.encode(codec))
    command = conversion_command(source, codec)
    assert shlex.split(command)[-1] == "my data-utf8.json"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "my data-utf8.json").read_text(encoding="utf-8") == ROW


@pytest.mark.parametrize(
    ("codec", "iconv_name", "text"),
    [("cp950", "CP950", "類型#褲*寬鬆"), ("big5hkscs", "BIG5-HKSCS", "嘅咗喺")],
)
def test_big5_is_offered_beside_gbk_and_its_command_converts(
    tmp_path: Path, codec: str, iconv_name: str, text: str
) -> None:
    source = tmp_path / "a.json"
    source.write_bytes(text.encode(codec))
    gbk, big5 = decode_text(source.read_bytes()).readings
    assert (gbk.encoding, big5.encoding, big5.codec) == (GBK, BIG5, iconv_name)
    assert text.startswith(big5.sample)
    subprocess.run(conversion_command(source, big5.codec), shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "a-utf8.json").read_text(encoding="utf-8") == text


def test_one_encoding_that_fits_is_offered_alone() -> None:
    text = "裙让人绕圈全去热缺"  # no pair of these bytes is Big5
    assert [one.codec for one in decode_text(text.encode("gbk")).readings] == ["GB18030"]
