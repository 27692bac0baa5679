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
from ptuning.data.tokenization import TokenizedExample, form_batches, to_whole_rows
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.quantization.layers import quantize_model_
from ptuning.select import scores
from ptuning.select.scores import (
    Base,
    mean_losses,
    mean_states,
    without_prompt,
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


def ifd_of(base: Base, rows: list[TextRow] = ROWS) -> list[float]:
    """Return the IFD of rows, in their order."""
    found = dict(base.ifd(rows))
    return [found[index] for index in range(len(rows))]


def test_losses_and_ifd_are_the_golden_ones(
    tiny: Model, batch: list[TokenizedExample], golden: Path
) -> None:
    rows = json.loads((golden / "ifd.json").read_text(encoding="utf-8"))["rows"]
    losses = mean_losses(tiny.eval(), [*batch, *map(without_prompt, batch)])
    for row, loss, alone in zip(rows, losses, losses[len(rows) :], strict=False):
        wanted = row["without_sop"]
        assert loss == pytest.approx(wanted["loss"], abs=1e-5), row["case"]
        assert alone == pytest.approx(wanted["loss_empty"], abs=1e-5), row["case"]
        assert loss / alone == pytest.approx(wanted["ifd"], abs=1e-5), row["case"]


def test_packed_rows_score_as_one_row_at_a_time(loaded_nano: Nano) -> None:
    packed, single = Base(*loaded_nano), Base(*loaded_nano)
    single.batch_tokens = 1
    assert ifd_of(packed) == pytest.approx(ifd_of(single), rel=1e-6)
    for base in (packed, single):
        base.centre_on(ROWS)
    torch.testing.assert_close(packed.states(ROWS), single.states(ROWS), atol=1e-5, rtol=0)
    assert packed.num_cut == single.num_cut == 0


def test_a_prefix_takes_part_and_changes_the_fingerprint(
    tiny_with_prefix: Model, batch: list[TokenizedExample], loaded_nano: Nano
) -> None:
    model = tiny_with_prefix.eval()
    with_prefix, tuned = mean_losses(model, batch), Base(model, loaded_nano[1]).fingerprint
    model.remove_prefix()
    base = mean_losses(model, batch)
    assert all(abs(one - other) > 1e-4 for one, other in zip(with_prefix, base, strict=True))
    assert Base(model, loaded_nano[1]).fingerprint != tuned


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_scores_are_those_of_plain_calls_of_the_model(
    tiny: Model, batch: list[TokenizedExample], bits: int | None
) -> None:
    if bits:
        quantize_model_(tiny, bits)
    losses, states = mean_losses(tiny.eval(), batch), mean_states(tiny, batch)
    assert states.shape == (len(batch), 32)
    for row, loss, state in zip(batch, losses, states, strict=True):
        wanted, hidden = plain(tiny, row.input_ids, row.context_length)
        assert loss == pytest.approx(wanted, abs=1e-5)
        pooled = functional.normalize(hidden.mean(dim=0), dim=0)  # (E,)
        torch.testing.assert_close(state, pooled, atol=1e-5, rtol=0)


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
    whole = to_whole_rows(tokenizer, ROWS, 2048)
    assert not any(row.answer_cut or row.prompt_cut for row in whole)
    longest = len(whole[5].input_ids)
    assert to_whole_rows(tokenizer, ROWS[5:], longest) == whole[5:]
    (cut,) = to_whole_rows(tokenizer, ROWS[5:], longest - 1)
    assert cut == whole[5]._replace(input_ids=whole[5].input_ids[:-1], answer_cut=True)

    room = whole[4].context_length - 2
    (short,) = to_whole_rows(tokenizer, ROWS[4:5], room)
    assert short.prompt_cut
    assert len(short.input_ids) <= room
    assert short.input_ids[short.context_length - 1 :][:2] == [
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
    ]

    monkeypatch.setattr(model.config, "max_sequence_length", longest - 1)
    base = Base(model, tokenizer)
    assert all(map(math.isfinite, ifd_of(base)))
    assert base.num_cut == 1


def test_an_empty_answer_has_the_loss_of_its_end(loaded_nano: Nano) -> None:
    model, tokenizer = loaded_nano
    (row,) = to_whole_rows(tokenizer, ROWS[3:4], 2048)
    assert row.input_ids[row.context_length :] == [tokenizer.sop_token_id, tokenizer.eop_token_id]
    wanted, _ = plain(model, row.input_ids, row.context_length)
    assert mean_losses(model, [row]) == pytest.approx([wanted], abs=1e-5)


def test_without_a_prompt_the_ratio_is_one(loaded_nano: Nano) -> None:
    assert ifd_of(Base(*loaded_nano))[2] == 1.0


@pytest.mark.parametrize("alone", [0.0, math.nan, math.inf])
def test_a_ratio_that_is_no_number_is_nan(
    loaded_nano: Nano, monkeypatch: pytest.MonkeyPatch, alone: float
) -> None:
    monkeypatch.setattr(scores, "mean_losses", lambda _, batch: [1.0, alone])
    assert math.isnan(ifd_of(Base(*loaded_nano), ROWS[:1])[0])


def test_rows_are_taken_block_by_block_and_all_are_scored(
    loaded_nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_ROWS", 4)
    base = Base(*loaded_nano)
    order = [index for index, _ in base.ifd(ROWS)]
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert sorted(order[4:]) == [4, 5]
    assert order == [index for index, _ in base.ifd(ROWS)]


def test_batches_hold_at_most_so_many_tokens() -> None:
    sizes = [30, 5, 12, 61, 30, 1]
    found = list(form_batches(sizes, 60))
    assert found == [[3], [0, 4], [2, 1, 5]]


def test_the_nearest_target_counts(loaded_nano: Nano) -> None:
    base = Base(*loaded_nano)
    base.centre_on(ROWS)
    states = base.states(ROWS)
    found = dict(base.nearness(ROWS, states[[1, 5]]))
    for index in range(len(ROWS)):
        wanted = max(float(states[index] @ states[target]) for target in (1, 5))
        assert found[index] == pytest.approx(wanted, abs=1e-5)
    assert found[1] == pytest.approx(1.0, abs=1e-5)


def test_centred_states_have_length_one_and_no_common_direction(loaded_nano: Nano) -> None:
    base = Base(*loaded_nano)
    plain_states = base.states(ROWS)
    base.centre_on(ROWS)
    base.centre_on(ROWS)  # again changes nothing
    centred = base.states(ROWS)
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(len(ROWS)))
    wanted = functional.normalize(plain_states - plain_states.mean(dim=0), dim=1)
    torch.testing.assert_close(centred, wanted, atol=1e-5, rtol=0)
    assert centred.mean(dim=0).norm() < plain_states.mean(dim=0).norm() / 2
