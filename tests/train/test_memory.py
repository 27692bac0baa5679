"""The arithmetic of memory is held to what a real training pass keeps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptuning.model.chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import can_prepack, prepack_if_room, prepack_weights_
from ptuning.model.quantization.layers import quantize_model_
from ptuning.train.fit import Fit, Workload, choose_fit
from ptuning.train.memory import (
    Batch,
    ModelSize,
    activation_bytes,
    answering_memory,
    cache_bytes,
    prepacked_bytes,
    size_of,
    training_memory,
    weight_bytes,
)
from tests.train.memory_rows import NO_ROWS, training_rows

PROMPTS, ANSWERS = (30, 21, 9), (40, 33, 50)
LENGTHS = tuple(p + a for p, a in zip(PROMPTS, ANSWERS, strict=True))
BATCH = Batch(LENGTHS, sum(ANSWERS))
SIZES = {"vocab_size": 256, "hidden_size": 128, "num_attention_heads": 4, "inner_hidden_size": 512}
IDS = {"bos_token_id": 252, "eos_token_id": 253, "mask_token_id": 254, "gmask_token_id": 255}


# Peaks in GB of the second training step of ChatGLM-6B in bfloat16 with a prefix of 128, on fake
# CUDA tensors of an 80 GiB card (python -m benchmarks.fake_cuda), with 0, 8, 12, 16 and 28 layers
# checkpointed, by weight bits, rows and the model's loss_chunk_tokens. One row has 64 prompt and
# 64 answer tokens; 16 are the first of ADGEN. cuBLAS's workspace is not in them.
FAKE_ROWS = {
    1: ((64, 64),),
    16: (
        (22, 63), (34, 63), (35, 63), (28, 63), (40, 63), (42, 56), (45, 63), (26, 46),
        (47, 63), (49, 63), (50, 63), (10, 63), (43, 38), (48, 63), (36, 63), (33, 63),
    ),
}  # fmt: skip
FAKE_LAYERS = (0, 8, 12, 16, 28)
FAKE_PEAKS = {
    (4, 1, None): (4.7091, 4.6681, 4.6177, 4.5672, 4.4801),
    (4, 1, 16): (4.6885, 4.6054, 4.5550, 4.5046, 4.4801),
    (4, 16, None): (10.1109, 8.7964, 8.1035, 7.4106, 5.3559),
    (4, 16, 16): (9.6772, 8.2914, 7.5985, 6.9055, 5.0723),
    (8, 1, None): (7.5277, 7.4866, 7.4362, 7.3858, 7.2987),
    (8, 1, 16): (7.5071, 7.4240, 7.3736, 7.3232, 7.2987),
    (8, 16, None): (12.9294, 11.6150, 10.9221, 10.2291, 8.1745),
    (8, 16, 16): (12.4958, 11.1099, 10.4170, 9.7241, 7.8909),
    (0, 1, None): (13.1628, 13.1217, 13.0713, 13.0209, 12.9338),
    (0, 1, 16): (13.1422, 13.0591, 13.0087, 12.9582, 12.9338),
    (0, 16, None): (18.5645, 17.2501, 16.5572, 15.8642, 13.8095),
    (0, 16, 16): (18.0012, 16.6263, 15.9334, 15.2404, 13.3918),
}


def build(
    dtype: torch.dtype, *, num_layers: int = 3, **changes: int
) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    config = ChatGLMConfig(**SIZES | IDS | changes, num_layers=num_layers, tie_word_embeddings=True)
    model = ChatGLMForConditionalGeneration(config).to(dtype)
    model.add_prefix(16)
    model.freeze_base()
    return model.train()


def make_batch() -> dict[str, Tensor]:
    ids = torch.randint(10, 200, (len(LENGTHS), max(LENGTHS)))
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids[row, prompt - 1], ids[row, prompt] = IDS["gmask_token_id"], IDS["bos_token_id"]
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def kept_bytes(model: ChatGLMForConditionalGeneration, run: Callable[[], object]) -> int:
    """Count what autograd keeps of a pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


def size_in(
    model: ChatGLMForConditionalGeneration, *, on_cpu: bool = True, **how: object
) -> ModelSize:
    return size_of(model.config, model.dtype, on_cpu=on_cpu, prefix_length=16, **how)


def published_size(dtype: torch.dtype, *, on_cpu: bool = False, **how: object) -> ModelSize:
    return size_of(ChatGLMConfig(), dtype, on_cpu=on_cpu, prefix_length=128, **how)


@pytest.mark.parametrize("layer_dropout", [0.0, 0.3])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_arithmetic_says(
    dtype: torch.dtype, on_cpu: bool, layer_dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two depths, so that what is kept once (the loss, the mask, the angles) drops out.

    Attention on the padded grid, as a GPU computes it, keeps the same tensors on a CPU, but for the
    dropout mask, which has the activations' dtype there and one byte an entry on a GPU.
    """
    monkeypatch.setattr(ChatGLMModel, "uses_varlen", lambda _: on_cpu)
    batch = make_batch()
    kept, expected = [], []
    for num_layers in (3, 5):
        model = build(dtype, num_layers=num_layers)
        model.set_layer_dropout(layer_dropout)
        kept.append(kept_bytes(model, lambda model=model: model(**batch).loss))
        size = size_in(model, on_cpu=on_cpu, layer_dropout=layer_dropout)
        expected.append(activation_bytes(size, BATCH))
        if not on_cpu:
            mask_entries = num_layers * len(LENGTHS) * 2 * 16 * SIZES["hidden_size"]
            expected[-1] += mask_entries * (dtype.itemsize - 1)
    assert kept[1] - kept[0] == pytest.approx(expected[1] - expected[0], rel=0.02)
    assert expected[0] == pytest.approx(kept[0], rel=0.1)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_to_the_byte(dtype: torch.dtype, bits: int) -> None:
    model = build(dtype)
    if bits:
        quantize_model_(model, bits)
    parameters = {p.data_ptr(): p.nbytes for _, p in model.base_parameters()}
    assert weight_bytes(size_in(model, weight_bits=bits)) == sum(parameters.values())


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prepacked_copies_are_counted_to_the_byte_and_only_where_there_is_room(
    dtype: torch.dtype, bits: int
) -> None:
    model = build(dtype)
    if bits:
        quantize_model_(model, bits)
    plain = size_in(model, weight_bits=bits)
    free = 4 * prepacked_bytes(plain)  # a quarter may be taken
    workload = Workload(torch.device("cpu"))
    assert not choose_fit(plain, workload, NO_ROWS, free=free - 4).size.prepacked
    size = choose_fit(plain, workload, NO_ROWS, free=free).size
    compiled = choose_fit(plain, replace(workload, compiles=True), NO_ROWS, free=free).size
    assert not compiled.prepacked, "a compiler has products of its own"
    taken = prepack_weights_(model, room_bytes=prepacked_bytes(plain))
    assert weight_bytes(size) - weight_bytes(plain) == taken
    assert size.prepacked == bool(taken) == (can_prepack(dtype) and not bits)
    assert prepack_if_room(model) == taken
    assert prepacked_bytes(size_in(model, tuning="full")) == 0, "what is trained is not prepacked"


@pytest.mark.skipif(not can_prepack(torch.float32), reason="this PyTorch was built without oneDNN")
@pytest.mark.parametrize("wanted", ["auto", "false"])
def test_prepacked_copies_cost_no_checkpointed_layer_and_no_run(wanted: str) -> None:
    """However much is free, the choice next to the copies is the one without them."""
    size = size_in(build(torch.float32, num_layers=8))
    rows = NO_ROWS._replace(train=training_rows((60, 50, 40) * 8, num_answer_tokens=12))
    workload = Workload(torch.device("cpu"), train_batch=24, checkpointing=wanted)
    copies = prepacked_bytes(size)

    def choose(free: int) -> Fit:
        return choose_fit(size, workload, rows, free=free)

    without = replace(workload, compiles=True)
    prepacked = []
    most = 2 * choose(0).needed_without
    for free in range(4 * copies, 4 * copies + most, most // 200):
        fit = choose(free)
        plain = choose_fit(size, without, rows, free=free)
        assert fit.checkpointed_layers == plain.checkpointed_layers
        assert fit.free == free - copies * fit.size.prepacked
        assert fit.fits or not fit.size.prepacked
        prepacked.append(fit.size.prepacked)
    assert prepacked[-1], "there is room for everything"
    assert prepacked.count(False), "there is not: the copies would take what a step needs"


@pytest.mark.parametrize("project", [False, True])
def test_trained_parameters_are_counted(project: bool) -> None:
    model = build(torch.float32)
    model.add_prefix(16, project=project)
    assert model.prefix_encoder is not None
    found = sum(p.numel() for p in model.prefix_encoder.parameters())
    assert size_in(model, projects_prefix=project).trained == found
    everything = sum(p.numel() for _, p in model.base_parameters())
    assert size_in(model, tuning="full").trained == everything


def test_checkpointing_saves_until_the_recomputed_layer_is_the_peak() -> None:
    model = build(torch.float32, num_layers=8)
    for on_cpu in (False, True):
        size = size_in(model, on_cpu=on_cpu)
        totals = [training_memory(size, BATCH, checkpointed_layers=n).total for n in range(9)]
        # From one on: on a CPU the first brings what the heap holds back with it.
        assert totals[1:5] == sorted(totals[1:5], reverse=True)
        assert min(totals) < 0.8 * totals[0]


@pytest.mark.parametrize(("bits", "num_rows", "chunk_tokens"), FAKE_PEAKS)
def test_a_step_on_a_gpu_is_planned_within_3_percent_of_fake_cuda(
    bits: int, num_rows: int, chunk_tokens: int | None
) -> None:
    rows = FAKE_ROWS[num_rows]
    batch = Batch(tuple(map(sum, rows)), sum(answer for _, answer in rows))
    size = published_size(torch.bfloat16, weight_bits=bits)
    for count, peak in zip(FAKE_LAYERS, FAKE_PEAKS[bits, num_rows, chunk_tokens], strict=True):
        plan = training_memory(size, batch, checkpointed_layers=count, chunk_tokens=chunk_tokens)
        assert plan.total / 1e9 == pytest.approx(peak, rel=0.03), count


def test_what_products_need_on_a_gpu_is_counted_where_they_need_it() -> None:
    """cuBLAS's workspace always; the dequantised block from 257 tokens on, for quantised weights."""
    few, more, many = Batch((256,), 64), Batch((257,), 64), Batch((2000,), 64)
    size = published_size(torch.bfloat16, weight_bits=4)
    half = replace(size, block_bytes=size.block_bytes // 2)

    def total(size: ModelSize, batch: Batch) -> int:
        # All layers but one checkpointed, so that the peak is that of a layer's products.
        return training_memory(size, batch, checkpointed_layers=27).total

    with_workspace = replace(size, workspace_bytes=1000)
    assert total(with_workspace, few) - total(size, few) == 1000
    assert total(size, few) == total(half, few)
    assert total(size, more) > total(half, more)
    assert total(size, many) - total(half, many) == half.block_bytes
    float_base = replace(size, weight_bits=0)
    assert total(float_base, many) == total(replace(float_base, block_bytes=0), many)
    wide = replace(size, block_bytes=10**9)
    assert total(wide, many) == total(size, many), "no block is larger than the largest weight"


def test_the_published_size_in_int4_holds_what_was_measured_on_a_processor() -> None:
    """docs/memory.md: 4.97 GB of weights in float32, 3.89 GB in bfloat16."""
    for dtype, gigabytes in ((torch.float32, 4.97), (torch.bfloat16, 3.89)):
        size = published_size(dtype, on_cpu=True, weight_bits=4)
        assert weight_bytes(size) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_cache_grows_with_rows_and_columns_and_answering_holds_it() -> None:
    size = published_size(torch.bfloat16)
    assert cache_bytes(size, 1, 1) == 2 * 28 * 4096 * 2

    def cache(prompts: list[int], num_rows: int) -> int:
        return answering_memory(size, prompts, num_rows=num_rows, new_tokens=64).terms["KV cache"]

    few = cache([64] * 100, 8)
    assert cache([64] * 100, 64) == 8 * few == cache_bytes(size, 64, 128)
    assert cache([64], 8) == few // 8
