"""Key/value caches: rows move with their positions, and what another program cached is a prefix."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.positions import position_ids
from tests.conftest import GMASK, PAD, SOP

Model = ChatGLMForConditionalGeneration
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


VERBS: dict[str, tuple[Callable[[Cache], None], list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 3, 1])), [2, 0, 3, 1]),
    "batch_select_indices": (
        lambda cache: cache.batch_select_indices(torch.tensor([3, 1])),
        [3, 1],
    ),
    "a bool mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([False, True, False, True])),
        [1, 3],
    ),
    "a slice": (lambda cache: cache.batch_select_indices(slice(1, 3)), [1, 2]),
    "batch_repeat_interleave": (
        lambda cache: cache.batch_repeat_interleave(2),
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
}
CACHES: dict[str, Callable[[Model], Cache | None]] = {
    "the model's own": lambda model: None,
    "dynamic": lambda model: DynamicCache(),
    "with a config": lambda model: DynamicCache(config=model.config),
}
COPIES: dict[str, Callable[[Cache], Cache]] = {
    "itself": lambda cache: cache,
    "a copy": copy.deepcopy,
    "a pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("kept", COPIES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("verb", VERBS)
def test_rows_of_a_cache_move_with_their_positions(
    small: Model, left_padded: dict[str, Tensor], verb: str, kind: str, kept: str
) -> None:
    """Prompts of different lengths: another row's positions would give other logits."""
    output = small(**left_padded, use_cache=True, past_key_values=CACHES[kind](small))
    cache = COPIES[kept](output.past_key_values)
    move, rows = VERBS[verb]
    move(cache)
    ids = left_padded["input_ids"][rows]
    mask = left_padded["attention_mask"][rows]
    for column in range(3):
        token = 30 + torch.arange(len(rows))[:, None] + 10 * column
        ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
        found = small(token, attention_mask=mask, past_key_values=cache).logits[:, -1]
        same(found, small(ids, attention_mask=mask).logits[:, -1])


def test_rows_of_a_static_cache_move_with_their_positions(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    cache = StaticCache(config=small.config, max_cache_len=20)
    small(**left_padded, use_cache=True, past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    ids = torch.cat((left_padded["input_ids"][[2, 0, 3, 1]], torch.full((4, 1), 30)), 1)
    mask = (ids != PAD).long()
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    same(found, small(ids, attention_mask=mask).logits[:, -1])


def test_a_cache_is_used_again_for_other_prompts(small: Model, prompts: list[list[int]]) -> None:
    cache = StaticCache(config=small.config, max_cache_len=20)
    small(torch.tensor(prompts[:1]), use_cache=True, past_key_values=cache)
    cache.reset()
    small(torch.tensor(prompts[2:3]), use_cache=True, past_key_values=cache)
    found = small(torch.tensor([[30]]), past_key_values=cache).logits
    same(found, small(torch.tensor([[*prompts[2], 30]])).logits[:, -1:])


def test_a_copy_of_a_cache_moves_its_own_rows(small: Model, left_padded: dict[str, Tensor]) -> None:
    """Copied layer by layer, as one branch of a search; the original stays as it was."""
    cache = small(**left_padded, past_key_values=DynamicCache()).past_key_values
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.reorder_cache(torch.tensor([2, 0, 3, 1]))
    ids = torch.nn.functional.pad(left_padded["input_ids"], (0, 1), value=30)
    mask = torch.nn.functional.pad(left_padded["attention_mask"], (0, 1), value=1)
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    same(found, small(ids, attention_mask=mask).logits[:, -1:])


class CountingCache(DynamicCache):
    """A cache of one's own."""

    moves = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.moves += 1
        super().reorder_cache(beam_idx)


def test_a_cache_class_of_ones_own_keeps_its_methods(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    cache = CountingCache()
    small(**left_padded, past_key_values=cache)
    order = torch.tensor([2, 0, 3, 1])
    cache.reorder_cache(order)
    assert isinstance(cache, CountingCache)
    assert cache.moves == 1
    ids = torch.nn.functional.pad(left_padded["input_ids"][order], (0, 1), value=30)
    mask = torch.nn.functional.pad(left_padded["attention_mask"][order], (0, 1), value=1)
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    same(found, small(ids, attention_mask=mask).logits[:, -1:])


def test_a_returned_cache_of_several_rows_continues_without_positions(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    first = small.generate(
        **left_padded,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=True,
        num_return_sequences=2,
        suppress_tokens=[PAD],
        return_dict_in_generate=True,
    )
    ids = first.sequences
    mask = (ids != PAD).long()
    found = small(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    same(found.logits[:, -1], small(ids, attention_mask=mask).logits[:, -1])


def test_a_cache_is_freed_without_the_garbage_collector(
    small: Model, prompts: list[list[int]]
) -> None:
    """A reference cycle would keep keys and values in memory for a while."""
    gc.disable()
    try:
        for make in (lambda: None, DynamicCache):
            cache = small(torch.tensor(prompts[:1]), past_key_values=make()).past_key_values
            keys = weakref.ref(cache.layers[0].keys)
            del cache
            assert keys() is None
    finally:
        gc.enable()


# What another program put in a cache is a prefix.


def as_cache(prefix: list[Tensor], num_rows: int) -> DynamicCache:
    """Put a prefix, L tensors (2, 1, H, P, D), in a cache, as peft's PrefixTuning does."""
    cache = DynamicCache()
    for index, layer in enumerate(prefix):
        keys, values = layer.expand(-1, num_rows, -1, -1, -1)
        cache.update(keys.clone(), values.clone(), index)
    return cache


def behind(mask: Tensor, prefix_length: int = 5) -> Tensor:
    return torch.cat((torch.ones(len(mask), prefix_length, dtype=mask.dtype), mask), 1)


@pytest.mark.parametrize("gives_positions", [False, True])
def test_keys_of_another_program_are_a_prefix(
    small: Model, left_padded: dict[str, Tensor], gives_positions: bool
) -> None:
    """Every token sees them, and the positions are those without them."""
    mask, more = left_padded["attention_mask"], {}
    if gives_positions:
        context = small.transformer.find_context(**left_padded)
        more["position_ids"] = position_ids(context, 0, mask.shape[1])
    cache = as_cache(list(small.transformer.prefix_for(True)), 4)
    found = small(
        left_padded["input_ids"],
        attention_mask=behind(mask),
        past_key_values=cache,
        use_prefix=False,
        **more,
    ).logits
    real = mask.bool()
    same(found[real], small(**left_padded).logits[real])


def test_decoding_continues_behind_a_prefix_of_another_program(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    cache = as_cache(list(small.transformer.prefix_for(True)), 4)
    small(ids, attention_mask=behind(mask), past_key_values=cache, use_prefix=False)
    for token in (30, 31):
        next_ids = torch.full((4, 1), token)
        ids, mask = torch.cat((ids, next_ids), 1), torch.cat((mask, torch.ones_like(next_ids)), 1)
        found = small(
            next_ids, attention_mask=behind(mask), past_key_values=cache, use_prefix=False
        ).logits
        same(found[:, -1], small(ids, attention_mask=mask).logits[:, -1])


def test_several_answer_tokens_at_once_are_causal_behind_given_positions(
    small: Model, prompts: list[list[int]]
) -> None:
    prompt, answer = prompts[0], [30, 31, 32]
    filled = small(torch.tensor([prompt]), use_cache=True).past_key_values
    foreign = DynamicCache()
    for index, layer in enumerate(filled.layers):
        foreign.update(layer.keys, layer.values, index)
    first = prompt.index(GMASK)
    positions = torch.tensor([[[first] * 3, [2, 3, 4]]])
    found = small(torch.tensor([answer]), past_key_values=foreign, position_ids=positions).logits
    same(found, small(torch.tensor([prompt + answer])).logits[:, -3:])


def test_answer_tokens_behind_a_cache_of_another_program_need_positions(small: Model) -> None:
    foreign = as_cache(list(small.transformer.prefix_for(True)), 2)
    with pytest.raises(
        ValueError, match=r"filled by another program.*give position_ids \(B, 2, S\)"
    ):
        small(torch.tensor([[5, GMASK, SOP], [30, 31, 32]]), past_key_values=foreign)


def test_a_prefix_of_another_program_serves_other_prompts_when_cropped(
    small: Model, prompts: list[list[int]]
) -> None:
    cache = as_cache(list(small.transformer.prefix_for(True)), 1)
    small(torch.tensor(prompts[:1]), past_key_values=cache, use_prefix=False)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]
    try:
        cache.crop(-1)  # tokens to remove, in some versions with a minus
    except ValueError:
        cache.crop(1)
    assert cache.get_seq_length() == 5
    found = small(torch.tensor(prompts[2:3]), past_key_values=cache, use_prefix=False).logits
    same(found, small(torch.tensor(prompts[2:3])).logits)


def test_a_whole_prompt_does_not_make_a_cache_of_other_rows_a_prefix(
    small: Model, prompts: list[list[int]]
) -> None:
    cache = small(torch.tensor(prompts[:1])).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"holds 1 row\(s\) for 2.*batch_repeat_interleave"):
        small(torch.tensor([prompts[3], prompts[3]]), past_key_values=cache)


def test_labels_on_padding_behind_a_prefix_do_not_count(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    wanted = small(**left_padded, labels=ids).loss
    cache = as_cache(list(small.transformer.prefix_for(True)), 4)
    found = small(
        ids, attention_mask=behind(mask), labels=ids, past_key_values=cache, use_prefix=False
    ).loss
    same(found, wanted)


def test_an_attention_mask_without_the_cached_columns_is_refused(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    cache = as_cache(list(small.transformer.prefix_for(True)), 4)
    with pytest.raises(ValueError, match=r"has 11 columns for 5 cached tokens and 11 of this call"):
        small(**left_padded, past_key_values=cache)


def peft_prefix(small: Model):
    """The small model, and peft's PrefixTuning around a copy with the same prefix."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(small)
    base.remove_prefix()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        num_layers=3,
        token_dim=32,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    wrapped = peft.get_peft_model(base, config)
    table = small.prefix_encoder.embedding.weight
    wrapped.prompt_encoder["default"].embedding.weight.copy_(table)
    return wrapped.eval()


def test_peft_prefix_tuning_computes_what_our_prefix_does(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    wrapped = peft_prefix(small)
    real = left_padded["attention_mask"].bool()
    same(wrapped(**left_padded).logits[real], small(**left_padded).logits[real])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_peft_prefix_tuning_generates_what_our_prefix_does(
    small: Model, left_padded: dict[str, Tensor], options: dict[str, int]
) -> None:
    wrapped = peft_prefix(small)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    found = wrapped.generate(**left_padded, **settings)
    assert found.equal(small.generate(**left_padded, **settings))


def test_peft_prefix_tuning_with_an_assistant_is_refused(
    small: Model, prompts: list[list[int]]
) -> None:
    """peft keeps the last of several candidates alone, so that answers would differ."""
    wrapped = peft_prefix(small)
    with pytest.raises(ValueError, match=r"position_ids is \(1, 2, \d+\) for input_ids \(1, 1\)"):
        wrapped.generate(torch.tensor(prompts[:1]), max_new_tokens=12, assistant_early_exit=1)


def test_peft_prefix_tuning_and_gradient_checkpointing_exclude_each_other(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    wrapped = peft_prefix(small).train()
    wrapped.base_model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="gradient_checkpointing=False"):
        wrapped(**training_batch)


def test_peft_prefix_tuning_trains_as_our_prefix_does(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    wrapped = peft_prefix(small)
    small.freeze_base()
    small.prefix_encoder.dropout = 0.0
    with torch.enable_grad():
        wanted = small.train()(**training_batch).loss
        wanted.backward()
        found = wrapped.train()(**training_batch).loss
        found.backward()
    same(found, wanted)
    table = wrapped.prompt_encoder["default"].embedding.weight
    same(table.grad, small.prefix_encoder.embedding.weight.grad)
