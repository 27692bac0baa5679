"""Prompts: the published rounds, and what each recipe makes of an empty history."""

import pytest

from ptuning.data.prompts import RowFormat, TextRow, build_rounds, to_example

ROW = TextRow(1, "天气怎么样？", "晴")
CHAT = ROW._replace(history=(("你好", "你好！"),))


def test_history_becomes_numbered_rounds() -> None:
    prompt = build_rounds("丙", [("甲", "1"), ("乙", "2")])
    assert prompt == "[Round 0]\n问：甲\n答：1\n[Round 1]\n问：乙\n答：2\n[Round 2]\n问：丙\n答："


def test_rounds_without_history_are_one_open_round() -> None:
    assert build_rounds("丙") == "[Round 0]\n问：丙\n答："


@pytest.mark.parametrize("for_training", [True, False])
def test_the_corrected_recipe_trains_on_what_chat_uses(for_training: bool) -> None:
    row_format = RowFormat(history_column="history")
    example = to_example(ROW, row_format, for_training=for_training)
    assert example.prompt == "天气怎么样？"
    assert not example.has_rounds


def test_the_published_recipe_trains_on_rounds_and_evaluates_on_the_bare_query() -> None:
    columns = RowFormat(history_column="history", recipe="published")
    assert to_example(ROW, columns).prompt == "[Round 0]\n问：天气怎么样？\n答："
    assert to_example(ROW, columns, for_training=False).prompt == "天气怎么样？"
    assert to_example(ROW, RowFormat(recipe="published")).prompt == "天气怎么样？"


@pytest.mark.parametrize("recipe", ["corrected", "published"])
@pytest.mark.parametrize("for_training", [True, False])
def test_a_history_is_written_the_same_everywhere(recipe: str, for_training: bool) -> None:
    example = to_example(CHAT, RowFormat(recipe=recipe), for_training=for_training)
    assert example.prompt == "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：天气怎么样？\n答："
    assert example.history == (("你好", "你好！"),)
    assert example.response == "晴"


def test_the_prefix_stands_before_the_whole_prompt() -> None:
    assert to_example(CHAT, RowFormat(source_prefix="礼貌：")).prompt.startswith(
        "礼貌：[Round 0]\n"
    )
    assert to_example(ROW, RowFormat(source_prefix="礼貌：")).prompt == "礼貌：天气怎么样？"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "xml"}, "--format is xml; use auto, columns, alpaca,"),
        ({"turns": "first"}, "--turns is first; use all or last."),
        ({"recipe": "old"}, "--recipe is old; use corrected or published."),
        ({"max_source_length": 2}, "--max_source_length is 2; use 3 or more"),
        ({"max_target_length": 2}, "--max_target_length is 2; use 3 or more"),
        (
            {"format": "alpaca", "prompt_column": "q"},
            "--format is alpaca, which says what the columns are, and --prompt_column is q; leave "
            "one of them out",
        ),
    ],
)
def test_a_row_format_refuses_what_cannot_be(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RowFormat(**changes)
