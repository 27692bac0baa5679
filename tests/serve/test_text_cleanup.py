"""The clean-up of chat answers against a two-pass reading of the published rule."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.serve.text_stream import clean_response

WIDE = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def mark_by_mark(text: str) -> str:
    """Widen one mark after the other, first behind and then before Chinese."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for narrow, wide in WIDE.items():
        text = re.sub(f"([\u4e00-\u9fff]){re.escape(narrow)}", f"\\1{wide}", text)
        text = re.sub(f"{re.escape(narrow)}([\u4e00-\u9fff])", f"{wide}\\1", text)
    return text


@given(st.text("中文,!:;?，a1 .\n[]训练时间"))
def test_one_pass_does_what_mark_by_mark_does(text: str) -> None:
    assert clean_response(text) == mark_by_mark(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\n 好 \n", "好"),
        ("截至[[训练时间]],", "截至2023年，"),
        ("a,b:c;d?e!", "a,b:c;d?e!"),
        ("中,a", "中，a"),
        ("a,中", "a，中"),
        ("中,,中", "中，，中"),
        ("好.", "好."),
        ("カ,カ", "カ,カ"),
        ("", ""),
    ],
)
def test_marks_are_widened_only_beside_chinese(text: str, clean: str) -> None:
    assert clean_response(text) == clean
