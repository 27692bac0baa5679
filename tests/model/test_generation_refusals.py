"""What decoding cannot do right, and says so instead of answering wrongly."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from tests.conftest import GMASK

Model = ChatGLMForConditionalGeneration


@torch.no_grad()
def test_a_filled_cache_of_someone_else_needs_positions(
    small: Model, prompts: list[list[int]]
) -> None:
    foreign = DynamicCache()
    for layer in range(3):
        foreign.update(torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16), layer)
    token = torch.tensor([[31]])
    with pytest.raises(ValueError, match=r"past_key_values was filled.*give position_ids"):
        small(token, past_key_values=foreign)
    positions = torch.tensor([[[4], [3]]])
    output = small(token, past_key_values=foreign, position_ids=positions)
    assert output.logits.shape == (1, 1, 64)


@torch.no_grad()
def test_a_cache_of_another_number_of_rows_needs_positions(
    small: Model, prompts: list[list[int]]
) -> None:
    cache = small(torch.tensor(prompts[:1]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"holds 1 row.*give position_ids"):
        small(torch.tensor([[31], [32]]), past_key_values=cache)


def test_a_cache_that_ends_inside_the_context_is_refused(
    small: Model, prompts: list[list[int]]
) -> None:
    """A later turn moves <sop>, and with it what earlier tokens may see: nothing can be reused."""
    first = small.generate(
        torch.tensor(prompts[:1]), max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True
    )
    answer = first.sequences[0, -2:].tolist()
    next_turn = torch.tensor([prompts[0][:-2] + answer + prompts[2]])
    with pytest.raises(ValueError, match=r"past_key_values.*context.*leave past_key_values out"):
        small.generate(next_turn, past_key_values=first.past_key_values, max_new_tokens=2)


def test_a_prompt_without_sop_is_refused(small: Model, prompts: list[list[int]]) -> None:
    rows = torch.tensor([prompts[0], [5, 6, 7, 8, 9, 10, 11, GMASK]])
    with pytest.raises(ValueError, match=r"prompt 1 has no <sop> \(id 62\).*add_special_tokens"):
        small.generate(rows, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt 0 has no <sop>"):
        small.generate(input_ids=rows[1:], max_new_tokens=2)


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((), {"prefill_chunk_size": 4}),
        ((), {"generation_config": GenerationConfig(prefill_chunk_size=4)}),
        ((GenerationConfig(prefill_chunk_size=4),), {}),
    ],
)
def test_a_context_in_chunks_is_refused(
    small: Model, prompts: list[list[int]], positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"prefill_chunk_size is 4.*leave it out"):
        small.generate(torch.tensor(prompts[:1]), *positional, **named)


def test_positions_cannot_be_given_to_generate(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    positions = torch.zeros(4, 2, left_padded["input_ids"].shape[1], dtype=torch.long)
    with pytest.raises(ValueError, match=r"position_ids are given to generate.*leave them out"):
        small.generate(**left_padded, position_ids=positions, max_new_tokens=2)


def test_embeddings_in_place_of_tokens_are_refused(small: Model) -> None:
    with pytest.raises(ValueError, match="give input_ids"):
        small.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=2)


@torch.no_grad()
def test_a_mask_that_is_not_bool_is_refused(small: Model, prompts: list[list[int]]) -> None:
    tokens = torch.tensor(prompts[1:2])
    ready = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert small(tokens, attention_mask=ready).logits.shape == (1, 3, 64)
    with pytest.raises(ValueError, match=r"attention_mask.*float32.*bool"):
        small(tokens, attention_mask=ready.float())
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 4\) for input_ids \(1, 3\)"):
        small(tokens, attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("shape", [(1, 3), (2, 8), (1, 12)])
def test_an_attention_mask_of_another_shape_is_refused(
    small: Model, prompts: list[list[int]], shape: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"attention_mask is .* for input_ids \(1, 8\)"):
        small.generate(torch.tensor(prompts[:1]), attention_mask=torch.ones(shape))


def test_continuous_batching_is_refused_at_once(small: Model, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"generate_batch lays.*one padded batch"):
        small.generate_batch(prompts)


def test_a_misspelled_option_is_refused(small: Model, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="max_new_tokns"):
        small.generate(torch.tensor(prompts[:1]), max_new_tokns=2)


@torch.no_grad()
def test_a_prefix_of_more_or_fewer_layers_is_refused(
    small: Model, prompts: list[list[int]]
) -> None:
    prefix = list(small.transformer.prefix_for(True) or ())
    tokens = torch.tensor(prompts[:1])
    for other in (prefix[:2], [*prefix, prefix[0]]):
        with pytest.raises(
            ValueError, match=rf"prefix_key_values has {len(other)} layers.*needs 3"
        ):
            small(tokens, prefix_key_values=other)
