"""Prompts are those of evaluation, token by token."""

import pytest

from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.serve.session import build_chat_prompt
from ptuning.tunings.loading import NANO_DIR
from tests.data.one_row import to_generation_prompt

HISTORY = [(f"类型#裤*版型#宽松{i}", f"这款裤子是宽松的版型，穿着舒适{i}。") for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(NANO_DIR)


@pytest.mark.parametrize("limit", [8, 15, 30, 50, 80, 130, 500])
@pytest.mark.parametrize("history", [[], HISTORY])
@pytest.mark.parametrize("source_prefix", ["", "写:"])
def test_prompts_are_those_of_evaluation(tokenizer, limit, history, source_prefix):
    question = "类型#裙*颜色#白色*风格#简约*图案#条纹"
    example = to_example(
        TextRow(1, question, history=tuple(history)),
        RowFormat(source_prefix=source_prefix),
        for_training=False,
    )
    expected = to_generation_prompt(tokenizer, example, max_source_length=limit)
    input_ids, notice = build_chat_prompt(
        tokenizer, question, history, max_source_length=limit, source_prefix=source_prefix
    )
    assert input_ids == expected
    whole = to_generation_prompt(tokenizer, example, max_source_length=5000)
    assert (notice is None) == (expected == whole)


def test_a_system_message_stays_when_turns_are_dropped(tokenizer):
    input_ids, notice = build_chat_prompt(
        tokenizer, "你好", HISTORY, max_source_length=70, system="请用活泼的语气"
    )
    text = tokenizer.decode(input_ids, skip_special_tokens=True)
    assert text.startswith("[Round 0]\n问:请用活泼的语气\n类型#裤")
    assert text.endswith("问:你好\n答:")
    assert notice.startswith("The prompt may have 70 tokens: the oldest ")
    assert len(input_ids) <= 70


def test_the_notice_says_what_is_missing(tokenizer):
    _, notice = build_chat_prompt(tokenizer, "类型#裤" * 20, HISTORY, max_source_length=20)
    assert notice == (
        "The prompt may have 20 tokens: the oldest 4 turns were left out and the end of the "
        "question was cut off."
    )
