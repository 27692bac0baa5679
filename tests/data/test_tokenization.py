"""Training rows, prompts and batches: the published numbers exactly, and what each recipe does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.data.prompts import Example, RowFormat, TextRow, build_rounds, to_example
from ptuning.data.tokenization import pad_right, to_generation_batch, to_training_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from tests.data.one_row import labels_of, to_generation_prompt, to_training_example

WIDE = {"max_source_length": 1000, "max_target_length": 1000}


def make(
    query: str, response: str = "", history: list | None = None, prefix: str = "", **changes: Any
) -> Example:
    row = TextRow(1, query, response, tuple(map(tuple, history or [])))
    row_format = RowFormat(history_column="history", source_prefix=prefix, **changes)
    return to_example(row, row_format)


def encode(tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# The published recipe


def golden_rows(golden: Path, name: str) -> list[dict] | dict:
    return json.loads((golden / "preprocess.json").read_text(encoding="utf-8"))[name]


def without_padding(row: dict) -> tuple[list[int], list[int]]:
    """Cut the golden row's right padding off: ours never pads here."""
    end = len(row["input_ids"])
    while row["input_ids"][end - 1] == 3:
        end -= 1
    return row["input_ids"][:end], row["labels"][:end]


def test_published_training_rows_are_repeated_exactly(
    real_tokenizer: ChatGLMTokenizer, golden: Path
) -> None:
    rows = golden_rows(golden, "train_64_64")
    examples = [
        to_example(TextRow(1, row["content"], row["summary"]), RowFormat(recipe="published"))
        for row in rows
    ]
    made = to_training_batch(
        real_tokenizer, examples, max_source_length=64, max_target_length=64, recipe="published"
    )
    assert len(made) == len(rows) == 14
    for example, row in zip(made, rows, strict=True):
        assert (example.input_ids, labels_of(example)) == without_padding(row)


def test_published_training_rows_with_history_are_repeated_exactly(
    real_tokenizer: ChatGLMTokenizer, golden: Path
) -> None:
    rows = golden_rows(golden, "train_256_256_history")
    for row in rows:
        example = make(row["prompt"], row["response"], row["history"], recipe="published")
        made = to_training_example(
            real_tokenizer,
            example,
            max_source_length=256,
            max_target_length=256,
            recipe="published",
        )
        assert (made.input_ids, labels_of(made)) == without_padding(row)
        assert row["padded_length"] == 512
    assert rows


def test_published_evaluation_rows_are_repeated_exactly(
    real_tokenizer: ChatGLMTokenizer, golden: Path
) -> None:
    case = golden_rows(golden, "eval_64_64")
    examples = [
        Example(text, label, text)
        for text, label in zip(case["contents"], case["summaries"], strict=True)
    ]
    prompts, cuts = to_generation_batch(
        real_tokenizer, examples, max_source_length=64, recipe="published"
    )
    longest = max(map(len, prompts))
    assert [[3] * (longest - len(prompt)) + prompt for prompt in prompts] == case["input_ids"]
    assert cuts == [False] * len(prompts)
    labels = real_tokenizer(case["summaries"], max_length=64, truncation=True)["input_ids"]
    assert labels == case["labels"]


def test_recipes_differ_on_the_real_rows_only_in_the_eop_of_cut_answers(
    real_tokenizer: ChatGLMTokenizer, golden: Path
) -> None:
    rows = golden_rows(golden, "train_64_64")
    cuts = 0
    for row in rows:
        example = to_example(TextRow(1, row["content"], row["summary"]), RowFormat())
        made = to_training_example(
            real_tokenizer, example, max_source_length=64, max_target_length=64
        )
        published, _ = without_padding(row)
        if made.answer_cut:
            cuts += 1
            assert [*made.input_ids, 130005] == published
        else:
            assert made.input_ids == published
    assert 0 < cuts < len(rows)


# Shape of a row


@pytest.mark.parametrize("recipe", ["corrected", "published"])
def test_a_row_is_prompt_gmask_sop_answer_eop(tokenizer: ChatGLMTokenizer, recipe: str) -> None:
    row = to_training_example(tokenizer, make("你好", "天气"), **WIDE, recipe=recipe)
    assert row.input_ids == tokenizer("你好", "天气")["input_ids"]
    context = len(encode(tokenizer, "你好")) + 1
    assert row.context_length == context
    assert row.input_ids[context] == tokenizer.sop_token_id
    assert labels_of(row) == [-100] * context + row.input_ids[context:]
    assert (row.prompt_cut, row.answer_cut) == (False, False)


def test_batch_and_single_agree(tokenizer: ChatGLMTokenizer) -> None:
    examples = [make("你好" * 9, "好" * 30), make("a", "b", [("c" * 9, "d")]), make("e", "f")]
    lengths = {"max_source_length": 12, "max_target_length": 10}
    assert to_training_batch(tokenizer, examples, **lengths) == [
        to_training_example(tokenizer, example, **lengths) for example in examples
    ]
    prompts, _ = to_generation_batch(tokenizer, examples, max_source_length=12)
    assert prompts == [
        to_generation_prompt(tokenizer, example, max_source_length=12) for example in examples
    ]
    assert to_training_batch(tokenizer, [], **lengths) == []


# Cutting answers


@pytest.mark.parametrize(("spare", "cut"), [(0, False), (1, False), (-1, True), (-5, True)])
def test_only_a_whole_answer_ends_in_eop(
    tokenizer: ChatGLMTokenizer, spare: int, cut: bool
) -> None:
    answer = "裤子的版型宽松，面料舒服，走路很方便。"
    answer_ids = encode(tokenizer, answer)
    lengths = {"max_source_length": 100, "max_target_length": len(answer_ids) + 2 + spare}
    row = to_training_example(tokenizer, make("你好", answer), **lengths)
    assert row.answer_cut is cut
    kept = answer_ids[: len(answer_ids) + min(spare, 0)]
    assert row.input_ids[row.context_length + 1 :] == (
        kept if cut else [*kept, tokenizer.eop_token_id]
    )
    published = to_training_example(tokenizer, make("你好", answer), **lengths, recipe="published")
    assert published.input_ids[row.context_length + 1 :] == [*kept, tokenizer.eop_token_id]


# Cutting prompts

HISTORY = [("第一个问题很长很长", "第一个答案"), ("第二个问题", "第二个答案"), ("三", "3")]


def lengths_of(tokenizer: ChatGLMTokenizer, query: str, history: list) -> list[int]:
    """Tokens of the rounds without the first 0, 1, 2, ... turns."""
    return [
        len(encode(tokenizer, build_rounds(query, history[start:])))
        for start in range(len(history) + 1)
    ]


def test_a_bare_prompt_keeps_its_head(tokenizer: ChatGLMTokenizer) -> None:
    text = "裤子的版型宽松，面料舒服，走路很方便。"
    ids = encode(tokenizer, text)
    row = to_training_example(
        tokenizer, make(text, "好"), max_source_length=10, max_target_length=9
    )
    assert row.input_ids[: row.context_length] == [*ids[:9], tokenizer.gmask_token_id]
    assert row.prompt_cut
    prompt = to_generation_prompt(tokenizer, make(text), max_source_length=10)
    assert prompt == [*ids[:8], tokenizer.gmask_token_id, tokenizer.sop_token_id]


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_the_oldest_turns_go_first(tokenizer: ChatGLMTokenizer, dropped: int) -> None:
    example = make("现在的问题", "好", HISTORY)
    budget = lengths_of(tokenizer, "现在的问题", HISTORY)[dropped]
    prompt = to_generation_prompt(tokenizer, example, max_source_length=budget + 2)
    expected = build_rounds("现在的问题", HISTORY[dropped:])
    assert prompt[:-2] == encode(tokenizer, expected)
    row = to_training_example(
        tokenizer, example, max_source_length=budget + 1, max_target_length=50
    )
    assert row.input_ids[: row.context_length - 1] == encode(tokenizer, expected)
    assert row.prompt_cut


def test_a_system_text_outlives_the_turns_that_are_cut(tokenizer: ChatGLMTokenizer) -> None:
    turns = [(f"甲{n}", f"乙{n}") for n in range(6)]
    history = ((f"海盗\n{turns[0][0]}", turns[0][1]), *turns[1:])
    example = to_example(TextRow(1, "丙", "丁", history, system="海盗"), RowFormat())
    whole = len(encode(tokenizer, example.prompt))
    seen = set()
    for length in range(30, whole + 2):
        prompt = to_generation_prompt(tokenizer, example, max_source_length=length)
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        if "丙" in text:
            assert text.startswith("[Round 0]\n问:海盗\n")
            seen.add(text.count("[Round"))
    assert len(seen) > 3


def test_a_history_that_fits_is_whole(tokenizer: ChatGLMTokenizer) -> None:
    budget = lengths_of(tokenizer, "问", HISTORY)[0]
    prompts, cuts = to_generation_batch(
        tokenizer, [make("问", "", HISTORY)], max_source_length=budget + 2
    )
    assert prompts[0][:-2] == encode(tokenizer, build_rounds("问", HISTORY))
    assert cuts == [False]


def test_the_published_recipe_loses_the_question_of_a_long_history(
    tokenizer: ChatGLMTokenizer,
) -> None:
    example = make("现在的问题", "好", HISTORY, recipe="published")
    prompt = to_generation_prompt(tokenizer, example, max_source_length=20, recipe="published")
    assert prompt[:-2] == encode(tokenizer, build_rounds("现在的问题", HISTORY))[:18]


def test_a_question_that_is_too_long_loses_its_end_but_not_the_call_for_an_answer(
    tokenizer: ChatGLMTokenizer,
) -> None:
    question = "天气怎么样" * 30
    example = make(question, "好", HISTORY, prefix="礼貌：")
    empty = len(encode(tokenizer, "礼貌：" + build_rounds("")))
    budget = empty + 20
    prompt = to_generation_prompt(tokenizer, example, max_source_length=budget + 2)
    text = tokenizer.decode(prompt)
    assert text.startswith("礼貌:[Round 0]\n问:天气怎么样")
    assert text.endswith("\n答:")
    kept = text.removeprefix("礼貌:[Round 0]\n问:").removesuffix("\n答:")
    assert question.startswith(kept)
    longer = "礼貌：" + build_rounds(question[: len(kept) + 1])
    assert len(prompt) - 2 <= budget < len(encode(tokenizer, longer))


def test_a_budget_below_the_bare_round_still_ends_in_the_call_for_an_answer(
    tokenizer: ChatGLMTokenizer,
) -> None:
    rounds = encode(tokenizer, build_rounds(""))
    prompt = to_generation_prompt(tokenizer, make("问", "", HISTORY), max_source_length=4)
    assert prompt == [*rounds[-2:], tokenizer.gmask_token_id, tokenizer.sop_token_id]


@given(
    query=st.text(max_size=40),
    response=st.text(max_size=40),
    history=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=3),
    source=st.integers(3, 60),
    target=st.integers(3, 60),
    recipe=st.sampled_from(["corrected", "published"]),
)
@settings(deadline=None, max_examples=60)
def test_every_row_keeps_its_limits(
    tokenizer: ChatGLMTokenizer,
    query: str,
    response: str,
    history: list,
    source: int,
    target: int,
    recipe: str,
) -> None:
    example = make(query, response, history, recipe=recipe)
    row = to_training_example(
        tokenizer, example, max_source_length=source, max_target_length=target, recipe=recipe
    )
    assert row.context_length <= source
    assert len(row.input_ids) - row.context_length <= target
    context, answer = row.input_ids[: row.context_length], row.input_ids[row.context_length :]
    assert context[-1] == tokenizer.gmask_token_id
    assert answer[0] == tokenizer.sop_token_id
    assert (answer[-1] == tokenizer.eop_token_id) is (recipe == "published" or not row.answer_cut)
    body = [*context[:-1], *answer[1:]]
    assert sum(token in tokenizer.control_ids for token in body) <= 1  # the <eop>
    prompt = to_generation_prompt(tokenizer, example, max_source_length=source, recipe=recipe)
    assert len(prompt) <= source


# Batches

ROWS = [
    {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]},
    {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])},
]


def test_training_rows_are_padded_on_the_right_to_the_longest() -> None:
    batch = pad_right(ROWS, pad_id=3)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [5, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    grids = ("input_ids", "attention_mask", "labels")
    assert {tuple(batch[name].shape) for name in grids} == {(2, 3)}


def test_a_batch_says_where_its_tokens_and_targets_are() -> None:
    labels = [[-100, 8, 9, -100, 6], [-100, -100], [-100, 4]]
    rows = [{"input_ids": list(range(10, 10 + len(row))), "labels": row} for row in labels]
    batch = pad_right(rows, pad_id=3)
    assert batch["tokens"].tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    packed = batch["input_ids"].flatten()[batch["tokens"]]
    assert packed.tolist() == [10, 11, 12, 13, 14, 10, 11, 10, 11]
    assert batch["needed"].tolist() == [0, 1, 3, 7]
    assert batch["targets"].tolist() == [8, 9, 6, 4]


@pytest.mark.parametrize("length", [3, 5])
def test_a_batch_can_be_made_longer(length: int) -> None:
    right = pad_right(ROWS, pad_id=3, pad_to_length=length)
    assert right["labels"].shape == (2, length)
    assert right["labels"][0, 3:].tolist() == [-100] * (length - 3)


def test_a_pad_id_inside_the_text_stays_visible() -> None:
    batch = pad_right([{"input_ids": [3, 3, 5], "labels": [3, 3, 5]}], pad_id=3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_rows_without_one_label_for_each_token_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 of the batch has 2 input_ids and 1 labels"):
        pad_right([{"input_ids": [1, 2], "labels": [1]}], pad_id=3)
