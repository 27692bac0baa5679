"""The attribute editor: strings to rows and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.serve.web_talk import join_attributes, parse_attributes

WORDS = st.text(alphabet="类型裤版宽松 abc1", min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_rows_survive_the_way_to_a_string_and_back(rows):
    assert parse_attributes(join_attributes(rows)) == rows


def test_a_key_may_come_twice_and_a_value_may_hold_the_pair_sign():
    rows = [("裙款式", "拼接"), ("裙款式", "口袋"), ("图案", "#1")]
    assert join_attributes(rows) == "裙款式#拼接*裙款式#口袋*图案##1"
    assert parse_attributes(join_attributes(rows)) == rows


@pytest.mark.parametrize(
    "text", ["", "你好", "类型#", "#裤", "类型#裤*", "类型#裤**版型#宽松", "a*b"]
)
def test_other_text_is_no_table(text):
    assert parse_attributes(text) is None


@pytest.mark.parametrize(
    "rows", [[], [["", ""]], [[None, None]], [["类型", ""]], [["", "裤"]], [["类型"]], [[]]]
)
def test_rows_without_key_or_value_are_left_out(rows):
    assert join_attributes([*rows, ["版型", "宽松"]]) == "版型#宽松"


@pytest.mark.parametrize("row", [("类#型", "裤"), ("类型", "裤*裙"), ("类*型", "裤")])
def test_a_separating_sign_is_refused_by_name(row):
    with pytest.raises(ValueError, match="separates attributes"):
        join_attributes([row])
