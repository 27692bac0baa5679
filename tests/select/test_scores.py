"""Losses, IFD and pooled states of rows: packed and cut to batches, they are the plain ones."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizer

from ptuning.data.prompts import TextRow
from ptuning.data.tokenization import TokenizedExample
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.quantization.layers import quantize_model_
from ptuning.select import scores
from ptuning.select.scores import (
    RowScores,
    centre,
    cosine_to_targets,
    encode_rows,
    score_batch,
    score_rows,
)

Model = ChatGLMForConditionalGeneration
Nano = tuple[Model, PreTrainedTokenizer]
ROWS = [
    TextRow(1, "类型#裙*颜色#白色", "这款白色的裙子，穿着舒适。"),
    TextRow(2, "你好", "你好！"),
    TextRow(3, "", "没有问题的回答。"),
    TextRow(4, "没有回答的问题", ""),
    TextRow(5, "颜色呢？", "蓝色。", (("类型是什么？", "外套。"), ("版型呢？", "修身。"))),
    TextRow(6, "类型#上衣*版型#宽松", "宽松的版型。" * 12),
]


@pytest.fixture
def batch(golden: Path) -> list[TokenizedExample]:
    """The golden rows of token ids."""
    return [
        TokenizedExample(row["input_ids"], len(row["prompt"]) + 1, False, False)
        for row in json.loads((golden / "ifd.json").read_text(encoding="utf-8"))["rows"]
    ]


def score_all(nano: Nano, batch_tokens: int | None = None) -> list[RowScores]:
    """Return the scores of ROWS, in their order."""
    batches = score_rows(*nano, ROWS, wants_loss=True, wants_pooled=True, batch_tokens=batch_tokens)
    found = {}
    for indices, scored in batches:
        found |= dict(zip(indices, scored, strict=True))
    return [found[index] for index in range(len(ROWS))]


def assert_same(found: RowScores, wanted: RowScores) -> None:
    """Equal but for the order of float32 sums: losses are 2 to 16, a pooled state has length 1."""
    assert found[:2] == pytest.approx(wanted[:2], rel=1e-6)
    torch.testing.assert_close(found.pooled, wanted.pooled, atol=1e-6, rtol=0)
    assert found.is_cut == wanted.is_cut


@pytest.mark.parametrize("wants_pooled", [False, True])
def test_losses_and_ifd_are_the_golden_ones(
    tiny: Model, batch: list[TokenizedExample], golden: Path, wants_pooled: bool
) -> None:
    rows = json.loads((golden / "ifd.json").read_text(encoding="utf-8"))["rows"]
    scored = score_batch(tiny, batch, wants_loss=True, wants_pooled=wants_pooled)
    for row, found in zip(rows, scored, strict=True):
        wanted = row["without_sop"]
        assert found.loss == pytest.approx(wanted["loss"], abs=1e-5), row["case"]
        assert found.loss_alone == pytest.approx(wanted["loss_empty"], abs=1e-5), row["case"]
        assert found.ifd == pytest.approx(wanted["ifd"], abs=1e-5), row["case"]
        assert (found.pooled is not None) == wants_pooled


def test_packed_rows_score_as_one_row_at_a_time(loaded_nano: Nano) -> None:
    for found, wanted in zip(score_all(loaded_nano), score_all(loaded_nano, 1), strict=True):
        assert_same(found, wanted)


def test_only_what_is_wanted_is_scored(tiny: Model, batch: list[TokenizedExample]) -> None:
    both = score_batch(tiny, batch, wants_loss=True, wants_pooled=True)
    for one, pooled in zip(
        both, score_batch(tiny, batch, wants_loss=False, wants_pooled=True), strict=True
    ):
        assert math.isnan(pooled.loss)
        assert math.isnan(pooled.loss_alone)
        torch.testing.assert_close(pooled.pooled, one.pooled, atol=1e-6, rtol=0)


def test_a_prefix_changes_nothing_and_the_mode_is_restored(
    tiny_with_prefix: Model, batch: list[TokenizedExample]
) -> None:
    model = tiny_with_prefix.train()
    with_prefix = score_batch(model, batch, wants_loss=True, wants_pooled=False)
    assert model.training
    model.remove_prefix()
    assert score_batch(model, batch, wants_loss=True, wants_pooled=False) == with_prefix


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_scores_are_those_of_plain_calls_of_the_model(
    tiny: Model, batch: list[TokenizedExample], bits: int | None
) -> None:
    if bits:
        quantize_model_(tiny, bits)
    scored = score_batch(tiny, batch, wants_loss=True, wants_pooled=True)
    for row, found in zip(batch, scored, strict=True):
        loss, states = plain(tiny, row.input_ids, row.context_length)
        alone, _ = plain(tiny, row.input_ids[row.context_length - 1 :], 1)
        assert found[:2] == pytest.approx((loss, alone), abs=1e-5)
        pooled = functional.normalize(states.mean(dim=0), dim=0)  # (E,)
        assert found.pooled is not None
        assert found.pooled.shape == (32,)
        torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def plain(model: Model, ids: list[int], sop: int) -> tuple[float, Tensor]:
    """Return the mean loss after <sop>, and the final hidden states (S, E)."""
    output = model(torch.tensor([ids]), output_hidden_states=True, use_prefix=False)
    answer = torch.tensor(ids[sop + 1 :])
    loss = functional.cross_entropy(output.logits[0, sop:-1], answer)
    return float(loss), output.hidden_states[-1][0]


def test_a_long_answer_is_cut_and_then_a_long_prompt(
    loaded_nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded_nano
    whole = encode_rows(tokenizer, ROWS, 2048)
    assert not any(row.answer_cut or row.prompt_cut for row in whole)
    longest = len(whole[5].input_ids)
    assert encode_rows(tokenizer, ROWS[5:], longest) == whole[5:]
    (cut,) = encode_rows(tokenizer, ROWS[5:], longest - 1)
    assert cut == whole[5]._replace(input_ids=whole[5].input_ids[:-1], answer_cut=True)

    room = whole[4].context_length - 2
    (short,) = encode_rows(tokenizer, ROWS[4:5], room)
    assert short.prompt_cut
    assert len(short.input_ids) <= room
    assert short.input_ids[short.context_length - 1 :][:2] == [
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
    ]

    monkeypatch.setattr(model.config, "max_sequence_length", longest - 1)
    scored = score_all(loaded_nano)
    assert [one.is_cut for one in scored] == [False] * 5 + [True]
    assert all(math.isfinite(one.ifd) for one in scored)


def test_an_empty_answer_has_the_loss_of_its_end(loaded_nano: Nano) -> None:
    model, tokenizer = loaded_nano
    (row,) = encode_rows(tokenizer, ROWS[3:4], 2048)
    assert row.input_ids[row.context_length :] == [tokenizer.sop_token_id, tokenizer.eop_token_id]
    wanted, _ = plain(model, row.input_ids, row.context_length)
    assert score_all(loaded_nano)[3].loss == pytest.approx(wanted, abs=1e-6)


def test_without_a_prompt_the_ratio_is_one(loaded_nano: Nano) -> None:
    assert score_all(loaded_nano)[2].ifd == 1.0


@pytest.mark.parametrize("alone", [0.0, math.nan, math.inf])
def test_a_ratio_that_is_no_number_is_nan(alone: float) -> None:
    assert math.isnan(RowScores(1.0, alone, None, False).ifd)


def test_batches_go_from_long_to_short_the_same_each_time(
    loaded_nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(batch_tokens: int) -> list[list[int]]:
        options = {"wants_loss": False, "wants_pooled": True, "batch_tokens": batch_tokens}
        return [indices for indices, _ in score_rows(*loaded_nano, ROWS, **options)]

    _, tokenizer = loaded_nano
    lengths = [len(row.input_ids) for row in encode_rows(tokenizer, ROWS, 2048)]
    found = order(60)
    assert found == order(60)
    flat = [index for batch in found for index in batch]
    assert sorted(flat) == list(range(len(ROWS)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(sum(lengths[i] for i in batch) <= 60 or len(batch) == 1 for batch in found)
    assert order(1) == [[index] for index in flat]
    monkeypatch.setattr(scores, "BLOCK_ROWS", 4)
    assert order(10_000) == [[i for i in flat if i < 4], [i for i in flat if i >= 4]]


def test_the_nearest_target_counts() -> None:
    pooled = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    targets = torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    assert cosine_to_targets(pooled, targets).tolist() == pytest.approx([0.8, 0.96])


def test_centred_states_have_length_one_and_no_common_direction() -> None:
    pooled = torch.tensor([[0.8, 0.6], [0.8, -0.6]])
    mean = pooled.mean(dim=0)
    torch.testing.assert_close(centre(pooled, mean), torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
