"""Recomputed layers change memory and time, never the loss or the gradient."""

import platform
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptuning.data.cache import TokenArrays
from ptuning.data.dataset import TokenDataset
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.layer import Layer
from ptuning.train.flags import (
    TrainingArguments,
    UsageError,
    check_gpu_is_here,
    parse_arguments,
)
from ptuning.train.memory import recompute_run, recomputing
from ptuning.train.memory.memory_model import Batch, size_of, training_memory
from ptuning.train.memory.recompute_run import recompute_as_asked
from ptuning.train.memory.recomputing import (
    FREE_SHARE,
    Choice,
    choose_recomputed,
    free_bytes,
    gpu_terms,
    recompute_layers,
)

NUM_LAYERS = 4
IDS = {"bos_token_id": 60, "eos_token_id": 61, "mask_token_id": 62, "gmask_token_id": 63}
SIZE = size_of(ChatGLMConfig(), dtype_bytes=2, prefix_length=128)
BATCH = Batch((128,) * 16, 64 * 16)


def build() -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=32, num_layers=NUM_LAYERS, num_attention_heads=2,
        inner_hidden_size=64, initializer_range=0.3, tie_word_embeddings=True, **IDS,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config)
    model.add_prefix(5)
    model.freeze_base()
    return model.train()


def loss_and_gradient(
    model: ChatGLMForConditionalGeneration, options: dict[str, bool] | None, count: int
) -> tuple[float, torch.Tensor]:
    recompute_layers(model, count, options)
    ids = torch.tensor([[5, 6, 7, 63, 60, 8, 9, 10], [9, 8, 63, 60, 7, 6, 5, 11]])
    labels = torch.where(torch.arange(8) >= torch.tensor([[4], [3]]), ids, -100)
    torch.manual_seed(1)  # the prefix's dropout
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert model.prefix_encoder is not None
    gradient = model.prefix_encoder.embedding.weight.grad
    assert gradient is not None
    model.zero_grad()
    return float(loss.detach()), gradient


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("count", [1, 3, NUM_LAYERS])
def test_loss_and_gradient_are_the_same(options: dict[str, bool] | None, count: int) -> None:
    model = build()
    runs: list[int] = []
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.attention.register_forward_hook(lambda *_: runs.append(1))
    loss, gradient = loss_and_gradient(model, options, 0)
    assert len(runs) == NUM_LAYERS
    runs.clear()
    again, recomputed = loss_and_gradient(model, options, count)
    assert len(runs) == NUM_LAYERS + count
    assert again == loss
    assert torch.equal(recomputed, gradient)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="--checkpoint_layers is 5 and the model has 4 layers"):
        recompute_layers(build(), 5)


def choose(wanted: str, free: float, num_layers: int | None = None) -> int:
    return choose_recomputed(
        wanted, SIZE, BATCH, free=int(free), on_cpu=False, accumulates=False, num_layers=num_layers
    ).num_recomputed


def needed(count: int, chunk_tokens: int | None = None, *, batch: Batch = BATCH) -> int:
    return training_memory(
        SIZE, batch, on_cpu=False, recomputed_layers=count, chunk_tokens=chunk_tokens
    ).of_step


def choose_way(
    free: float, *, batch: Batch = BATCH, wanted: str = "auto"
) -> tuple[int, int | None]:
    choice = choose_recomputed(wanted, SIZE, batch, free=int(free), on_cpu=False, accumulates=False)
    assert choice.needed == needed(choice.num_recomputed, choice.chunk_tokens, batch=batch)
    return choice.num_recomputed, choice.chunk_tokens


def test_auto_recomputes_nothing_where_memory_is_free_and_the_fewest_layers_elsewhere() -> None:
    assert choose("auto", 2 * needed(0)) == 0
    middle = choose("auto", needed(10, 16) / FREE_SHARE + 1)
    assert middle == 10
    assert choose("auto", 1) == min(range(29), key=lambda count: needed(count, 16))


def test_the_loss_gets_a_smaller_chunk_before_a_layer_is_recomputed() -> None:
    assert choose_way(needed(0) / FREE_SHARE + 1) == (0, None)
    for chunk in (256, 128):  # the largest that fits: every chunk reads the head again
        assert choose_way(needed(0, chunk) / FREE_SHARE + 1) == (0, chunk)
    count, chunk = choose_way(0.99 * needed(0, 16) / FREE_SHARE)
    assert count >= 1
    assert needed(count, chunk) == needed(count, 16), "the chunk that needs the least"
    assert needed(count, 2 * (chunk or 0)) > needed(count, 16), "and the largest of those"


def test_a_chunk_is_smaller_only_where_that_lowers_the_peak() -> None:
    """With few answer tokens the peak is elsewhere, and a chunk of all of them is no chunk."""
    batch = Batch((1000,), 16)
    assert choose_way(1, batch=batch)[1] is None


@pytest.mark.parametrize("how", [{"embedding_bits": 8}, {"tuning": "full", "prefix_length": 0}])
def test_the_chunk_stays_on_a_cpu_and_where_there_is_none(how: dict[str, Any]) -> None:
    for size, on_cpu in ((SIZE, True), (replace(SIZE, **how), False)):
        choice = choose_recomputed("auto", size, BATCH, free=1, on_cpu=on_cpu, accumulates=False)
        assert choice.chunk_tokens is None


def test_a_fixed_number_of_layers_still_leaves_the_chunk_to_what_fits() -> None:
    for wanted, expected in (("false", 0), ("true", 28)):
        count, chunk = choose_way(1, wanted=wanted)
        assert count == expected
        assert needed(count, chunk) == needed(count, 16) < needed(count)
    assert choose_way(10**12, wanted="true") == (28, None)


def test_a_choice_says_its_chunk() -> None:
    choice = choose_recomputed(
        "auto", SIZE, BATCH, free=int(needed(0, 128) / FREE_SHARE) + 1,
        on_cpu=False, accumulates=False,
    )  # fmt: skip
    said = choice.describe()
    assert "no layer is recomputed, the loss is computed in chunks of 128 tokens; a step" in said
    assert f", {needed(0) / 1e9:.2f} without," in said


def test_the_chunk_that_was_chosen_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    loss, gradient = loss_and_gradient(model, None, 0)
    rows = TokenDataset(TokenArrays(np.zeros(8, np.int32), np.array([0, 8]), np.array([4])))
    arguments = parse_arguments([*BARE, "--use_cpu"])
    choice = Choice(2, NUM_LAYERS, 1, 2, 3, "auto", 2)
    monkeypatch.setattr(recompute_run, "choose_for_run", lambda *_: choice)
    assert recompute_as_asked(model, arguments.model, arguments.training, rows) is choice
    head: Any = model.lm_head
    formed, product = [], head.product
    head.product = lambda x: formed.append(len(x)) or product(x)
    again, in_chunks = loss_and_gradient(model, None, 2)
    assert formed == [2, 2, 2, 2, 1], "9 answer tokens"
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(in_chunks, gradient)


def test_free_memory_is_what_a_target_leaves_beside_this_processs_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 15)
    assert free_bytes(gpu) == 55
    assert free_bytes(gpu, target=40) == 25
    assert free_bytes(gpu, target=10) == 0
    assert free_bytes(gpu, target=79) == 55, "other processes hold the rest"
    assert free_bytes(torch.device("cpu"), 1, 40) == 40, "a GPU that is not here is empty"


def test_a_gpus_block_and_workspace_are_those_of_its_size_and_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(recomputing, "block_bytes", lambda _: 7)
    for capability, mebibytes in (((9, 0), 32), ((8, 6), 8.125)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        expected = {"block_bytes": 7, "workspace_bytes": int(mebibytes * 2**20)}
        assert gpu_terms(gpu, None) == gpu_terms(gpu, 8 * 10**9) == expected
    assert gpu_terms(torch.device("cpu"), None) == {}
    planned = gpu_terms(torch.device("cpu"), 6 * 10**9)
    assert planned == {"block_bytes": 6 * 10**9 // 64, "workspace_bytes": 32 * 2**20}


def test_true_takes_all_or_the_number_given_and_false_none() -> None:
    assert choose("true", 1e15) == 28
    assert choose("true", 1e15, num_layers=7) == choose("auto", 1e15, num_layers=7) == 7
    assert choose("false", 1, num_layers=7) == 0


def test_a_choice_that_may_not_fit_says_so() -> None:
    choice = choose_recomputed("auto", SIZE, BATCH, free=10, on_cpu=False, accumulates=False)
    assert choice.describe().endswith("it may not fit")
    assert "may not" not in choice._replace(free=10**15).describe()


ROOT = Path(__file__).resolve().parents[2]
BARE = ["--do_train", "--train_file", "x.json", "--model_name_or_path", "x", "--pre_seq_len", "4"]
BARE += ["--output_dir", "y"]


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ([], "auto"),
        (["--gradient_checkpointing"], "true"),
        (["--gradient_checkpointing", "True"], "true"),
        (["--gradient_checkpointing=false"], "false"),
        (["--gradient_checkpointing", "auto"], "auto"),
    ],
)
def test_old_and_new_ways_to_type_it_are_understood_without_a_warning(
    typed: list[str], wanted: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        training = parse_arguments([*BARE, *typed]).training
    assert training.recomputing == wanted
    assert not training.gradient_checkpointing  # transformers is told nothing
    assert not getattr(training, "activation_checkpointing", False)


def test_options_for_torch_are_kept_and_other_words_refused() -> None:
    typed = ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    assert parse_arguments([*BARE, *typed]).training.recomputing_options == {"use_reentrant": True}
    with pytest.raises(UsageError, match="--gradient_checkpointing is perhaps; use auto, true"):
        parse_arguments([*BARE, "--gradient_checkpointing", "perhaps"])
    assert TrainingArguments(output_dir="y", gradient_checkpointing=True).recomputing == "true"


@pytest.mark.parametrize("typed", ["0", "-8", "nan", "inf"])
def test_a_memory_target_is_a_number_above_0(typed: str) -> None:
    with pytest.raises(UsageError, match=f"--gpu_memory is {typed}; give GB above 0, such as 8"):
        parse_arguments([*BARE, "--gpu_memory", typed])


def test_a_memory_target_means_a_gpu_here_or_not() -> None:
    training = parse_arguments([*BARE, "--use_cpu", "--gpu_memory", "4.6"]).training
    assert training.memory_target == 4_600_000_000
    assert not training.on_cpu
    with pytest.raises(UsageError, match=r"--gpu_memory is 4\.6 and this run computes on cpu"):
        check_gpu_is_here(training)
    plain = parse_arguments([*BARE, "--use_cpu"]).training
    assert plain.memory_target is None
    assert plain.on_cpu
    check_gpu_is_here(plain)


FAULTS = """
import resource, sys, torch
from ptuning.train.memory.recomputing import give_back_freed_memory, keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each: 20,480 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

arranged = keep_freed_memory()
print(min(faults_of_a_step() for _ in range(5)), arranged, give_back_freed_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    kept, *arranged = done.stdout.split()
    assert arranged == ["True", "True"]
    assert int(kept) < 40  # by itself glibc faults in all 20,480 pages, or 40 huge ones
