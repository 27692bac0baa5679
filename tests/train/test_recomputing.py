"""Recomputed layers change memory and time, never the loss or the gradient."""

import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.layer import Layer
from ptuning.train.flags import TrainingArguments, UsageError, parse_arguments
from ptuning.train.memory.memory_model import Batch, size_of, training_memory
from ptuning.train.memory.recomputing import FREE_SHARE, choose_recomputed, recompute_layers

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


def test_auto_recomputes_nothing_where_memory_is_free_and_the_fewest_layers_elsewhere() -> None:
    def needed(count: int) -> int:
        return training_memory(SIZE, BATCH, on_cpu=False, recomputed_layers=count).of_step

    assert choose("auto", 2 * needed(0)) == 0
    middle = choose("auto", needed(10) / FREE_SHARE + 1)
    assert middle == 10
    assert choose("auto", 1) == min(range(29), key=needed)


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
