"""GLM's positions and mask on rows small enough to check by eye."""

import pytest
import torch
from torch import Tensor

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.positions import Context, find_context, position_ids, visible_keys
from tests.conftest import GMASK, MASK, PAD, SOP


def context_of(rows: list[list[int]], attention_mask: list[list[int]] | None = None) -> Context:
    return find_context(
        torch.tensor(rows),
        None if attention_mask is None else torch.tensor(attention_mask),
        bos_token_id=SOP,
        mask_token_id=MASK,
        gmask_token_id=GMASK,
    )


def as_lists(context: Context) -> list[list[int]]:
    return [values.tolist() for values in context]


def test_a_plain_row() -> None:
    context = context_of([[5, 6, GMASK, SOP, 7, 8]])
    assert as_lists(context) == [[0], [3], [2]]
    assert position_ids(context, 0, 6).tolist() == [[[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]]


def test_position_ids_have_two_channels_of_long_integers() -> None:
    found = position_ids(context_of([[5, 6, GMASK, SOP]] * 3), 0, 4)
    assert found.shape == (3, 2, 4)
    assert found.dtype == torch.long


@pytest.mark.parametrize(
    ("row", "mask_position"),
    [
        ([5, GMASK, 6, SOP, 7], 1),  # [gMASK] in mid-context
        ([MASK, 5, GMASK, SOP, 7], 2),  # [gMASK] goes before an earlier [MASK]
        ([5, MASK, 6, SOP, 7], 1),  # no [gMASK]: [MASK]
        ([GMASK, 5, GMASK, SOP, 7], 0),  # the first of two
        ([5, 6, 7, SOP, GMASK], 2),  # none in the context: its last token
        ([SOP, 5, 6, 7, 8], 0),  # no context at all
    ],
)
def test_where_the_answer_stands(row: list[int], mask_position: int) -> None:
    assert context_of([row]).mask_position.tolist() == [mask_position]


def test_only_the_first_sop_ends_the_context() -> None:
    assert context_of([[5, GMASK, SOP, 7, SOP]]).end.tolist() == [2]


def test_a_row_without_sop_is_all_context() -> None:
    context = context_of([[5, 6, 7, 8]])
    assert as_lists(context) == [[0], [4], [3]]
    assert position_ids(context, 0, 4).tolist() == [[[0, 1, 2, 3], [0, 0, 0, 0]]]
    assert visible_keys(context.end, None, 0, 4, 4).all()


def test_padding_on_both_sides() -> None:
    rows = [[PAD, PAD, 5, GMASK, SOP, 7], [5, GMASK, SOP, 7, PAD, PAD]]
    masks = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    context = context_of(rows, masks)
    assert as_lists(context) == [[2, 0], [4, 2], [1, 1]]
    found = position_ids(context, 0, 6)
    assert found[0].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 2]]
    assert found[1, :, :4].tolist() == [[0, 1, 1, 1], [0, 0, 1, 2]]


def test_positions_of_later_columns_go_on_from_the_cache() -> None:
    context = context_of([[5, GMASK, SOP], [PAD, GMASK, SOP]], [[1, 1, 1], [0, 1, 1]])
    found = position_ids(context, 3, 2)
    assert found.tolist() == [[[1, 1], [2, 3]], [[0, 0], [2, 3]]]
    whole = position_ids(context, 0, 5)
    assert torch.equal(whole[..., 3:], found)


def test_everybody_sees_the_context_and_the_answer_is_causal() -> None:
    visible = visible_keys(torch.tensor([2]), None, 0, 4, 4)
    assert visible.shape == (1, 1, 4, 4)
    assert visible[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_padding_is_hidden_and_sees_itself_only_besides_the_rule() -> None:
    mask = torch.tensor([[0, 1, 1, 1]])
    visible = visible_keys(torch.tensor([2]), mask, 0, 4, 4)
    assert visible[0, 0].int().tolist() == [
        [1, 1, 0, 0],  # the padding itself: no row is empty
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 1],
    ]


def test_queries_behind_a_cache() -> None:
    visible = visible_keys(torch.tensor([2, 3]), None, 3, 2, 6)
    assert visible.shape == (2, 1, 2, 6)
    assert visible[:, 0].int().tolist() == [[[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]] * 2


def test_columns_beyond_the_attention_mask_follow_the_rule_alone() -> None:
    mask = torch.tensor([[0, 1, 1]])
    visible = visible_keys(torch.tensor([2]), mask, 3, 1, 6)
    assert visible[0, 0].int().tolist() == [[0, 1, 1, 1, 0, 0]]


def test_an_attention_mask_wider_than_the_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has 5 columns.*4 keys"):
        visible_keys(torch.tensor([2]), torch.ones(1, 5), 0, 4, 4)


def padded(rows: list[list[int]], left: int, right: int) -> tuple[Tensor, Tensor]:
    input_ids = torch.tensor([[PAD] * left + row + [PAD] * right for row in rows])
    mask = torch.zeros_like(input_ids)
    mask[:, left : left + len(rows[0])] = 1
    return input_ids, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_prefix", [True, False])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 4)])
@torch.no_grad()
def test_padding_on_any_side_leaves_the_logits_alone(
    small: ChatGLMForConditionalGeneration,
    implementation: str,
    use_prefix: bool,
    left: int,
    right: int,
) -> None:
    small.set_attn_implementation(implementation)
    row = [5, 6, MASK, 7, GMASK, SOP, 8, 9]
    alone = small(torch.tensor([row]), use_prefix=use_prefix).logits
    input_ids, mask = padded([row], left, right)
    beside = small(input_ids, attention_mask=mask, use_prefix=use_prefix).logits
    torch.testing.assert_close(beside[:, left : left + len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_prefix", [True, False])
@torch.no_grad()
def test_a_fully_padded_row_gives_no_nan(
    small: ChatGLMForConditionalGeneration, implementation: str, use_prefix: bool
) -> None:
    small.set_attn_implementation(implementation)
    input_ids = torch.tensor([[PAD] * 5, [5, 6, GMASK, SOP, 7]])
    mask = (input_ids != PAD).long()
    logits = small(input_ids, attention_mask=mask, use_prefix=use_prefix).logits
    assert logits.isfinite().all()
    alone = small(input_ids[1:], use_prefix=use_prefix).logits
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=1e-5)
