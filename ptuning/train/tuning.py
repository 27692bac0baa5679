"""From a RunConfig to what it tunes and the model with that attached.

The trainer and main.py know only the protocol `Tuning`; its three kinds are in `ptuning.tunings`.
They take plain values and raise ValueError; errors in a checkpoint become UsageErrors here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Seq2SeqTrainingArguments, set_seed

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.files import find_weight_files
from ptuning.train.processes import shards_weights
from ptuning.train.run_config import RunConfig, UsageError
from ptuning.tunings.artefact import FULL, LORA, TrainedState
from ptuning.tunings.full import FullTuning
from ptuning.tunings.loading import choose_dtype, load_base
from ptuning.tunings.lora import LoraTuning
from ptuning.tunings.prefix import PrefixTuning


class Tuning(Protocol):
    """One way of tuning the base."""

    @property
    def weights(self) -> str:
        """Directory or hub id that the model is loaded from."""

    @property
    def checkpoint(self) -> str | None:
        """What training starts from or what is scored, besides the base; None for a new one."""

    @property
    def base(self) -> str | None:
        """The untouched base to compare with; None when it is not known."""

    def check_files(self) -> None:
        """Refuse a damaged checkpoint before the base is loaded (ValueError, FileNotFoundError)."""

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the dtype to load the model in, given the one that it answers in."""

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Give model what is trained, new or from a checkpoint, and freeze everything else.

        ValueError when the checkpoint does not fit.
        """

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Say in one line what is trained and what stays frozen."""

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write what is trained, and nothing of the frozen base, to directory."""

    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Put the values of a checkpoint into the parameters that the optimizer holds."""

    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> AbstractContextManager[ChatGLMForConditionalGeneration]:
        """Give the untouched base to answer with inside a block; model is as before after it."""


def open_tuning(config: RunConfig) -> Tuning:
    """Return the tuning that a run asks for; its checkpoint is sound, no base is loaded."""
    base, checkpoint = config.model_name_or_path, config.checkpoint
    if Path(base).is_dir():
        with _usage_errors("--model_name_or_path"):
            find_weight_files(Path(base))
    tuning: Tuning
    if config.tuning == LORA:
        targets = config.lora_target_modules
        tuning = LoraTuning(
            base,
            checkpoint,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=None if targets is None else targets.split(","),
        )
    elif config.tuning == FULL:
        tuning = FullTuning(
            base,
            checkpoint,
            trains=config.do_train,
            tokenizer_name=config.tokenizer_name,
            hub=config.hub,
        )
    else:
        tuning = PrefixTuning(
            base,
            checkpoint,
            length=config.pre_seq_len,
            project=config.prefix_projection,
            init_std=config.prefix_init_std,
        )
    with _usage_errors(_flag_of_tuned(config)):
        tuning.check_files()
    return tuning


def load_model(
    config: RunConfig, tuning: Tuning, arguments: Seq2SeqTrainingArguments
) -> ChatGLMForConditionalGeneration:
    """Load the base, attach what is tuned, and put the model on the run's device.

    An engine that shards the weights for training places them itself.
    """
    set_seed(config.seed)
    model = load_base(
        tuning.weights,
        dtype=tuning.load_dtype(choose_dtype(arguments.device, config.dtype_name)),
        quantization_bit=config.quantization_bit,
        quantization_backend=config.quantization_backend,
        quantize_embeddings=config.quantize_embeddings,
        **config.hub,
    )
    with _usage_errors(_flag_of_tuned(config)):
        tuning.attach(model)
    if not (config.do_train and shards_weights(arguments)):
        model.to(arguments.device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
    return model


@contextmanager
def _usage_errors(flag: str) -> Iterator[None]:
    """Turn an error in files into a UsageError that names the flag that asked for them."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{flag}: {error}") from error


def _flag_of_tuned(config: RunConfig) -> str:
    """Return the flag that named the checkpoint, or asked for what is new."""
    if config.checkpoint in (None, config.model_name_or_path):
        return f"--tuning is {config.tuning}"
    return config.checkpoint_flag


def newest_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the newest loss, eval_loss and epoch of a trainer's log."""
    return {
        name: float(value)
        for entry in log_history
        for name, value in entry.items()
        if name in ("loss", "eval_loss", "epoch")
    }
