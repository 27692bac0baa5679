"""What a run trains, and how that is attached, written and read back.

The trainer and main.py know a Tuning only. P-Tuning v2's prefix is here, the two others in `lora`
and `full`; `open_tuning` picks one.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Seq2SeqTrainingArguments, set_seed

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.quantization.layers import QuantizedLinear
from ptuning.train.processes import shards_weights
from ptuning.train.run_config import RunConfig, UsageError
from ptuning.tunings.artefact import FULL, LORA, PTUNING, remove_other_marks
from ptuning.tunings.loading import check_weights, choose_dtype, load_base
from ptuning.tunings.prefix import (
    load_prefix,
    prefix_shape,
    read_prefix_tensors,
    save_prefix,
)

logger = logging.getLogger("main")


class TrainedState(NamedTuple):
    """What an artefact remembers of the run: step, newest figures, and how rows became tokens.

    tensors are the model's by name where a launcher gathered them from several processes
    (DeepSpeed, FSDP); None: the model holds its own.
    """

    step: int
    metrics: dict[str, float]
    settings: dict[str, Any]
    tensors: Mapping[str, Tensor] | None = None


class Tuning(Protocol):
    """One way of tuning the base."""

    @property
    def weights(self) -> str:
        """Directory or hub id that the model is loaded from."""

    @property
    def checkpoint(self) -> str | None:
        """What training starts from or what is scored, besides the base; None for a fresh one."""

    @property
    def base(self) -> str | None:
        """The untouched base to compare with; None when it is not known."""

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the dtype to load the model in, given the one that it answers in."""

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Give model what is trained, fresh or from a checkpoint, and freeze everything else.

        UsageError when the checkpoint does not fit.
        """

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Say in one line what is trained and what stays frozen."""

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write what is trained, and nothing of the frozen base, to directory."""

    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Put the values of a checkpoint into the parameters that the optimiser holds."""

    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> AbstractContextManager[ChatGLMForConditionalGeneration]:
        """Give the untouched base to answer with inside a block; model is as before after it."""


class PrefixTuning:
    """P-Tuning v2: a prefix of keys and values in every layer, the base frozen."""

    def __init__(self, config: RunConfig) -> None:
        """Read the prefix to start from once, so that a damaged one is reported before the base
        loads (UsageError).
        """
        self.config = config
        self.weights = config.model_name_or_path
        self.base: str | None = self.weights
        self.checkpoint = config.checkpoint
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
            with checkpoint_explained(config.checkpoint_flag):
                prefix_shape(read_prefix_tensors(path), path)

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the frozen base's dtype; the prefix is float32 in any case."""
        return answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Attach the prefix to start from, or a new one; freeze the base."""
        config = self.config
        if self.checkpoint is not None:
            with checkpoint_explained(config.checkpoint_flag):
                info = load_prefix(
                    model,
                    self.checkpoint,
                    expected_length=config.pre_seq_len,
                    expected_projection=config.prefix_projection,
                )
            step = "" if info.step is None else f", step {info.step}"
            logger.info("Prefix %s: %d tokens%s", self.checkpoint, info.prefix_length, step)
        else:
            encoder = model.add_prefix(
                int(config.pre_seq_len or 0), project=bool(config.prefix_projection)
            )
            if config.prefix_init_std is not None:
                encoder.scale_entries(config.prefix_init_std)
        model.freeze_base()

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Count prefix tokens, trained and frozen parameters."""
        encoder = model.prefix_encoder
        assert encoder is not None, "attach ran before"
        trained = sum(p.numel() for p in encoder.parameters())
        mlp = " through an MLP" if encoder.project else ""
        return (
            f"a prefix of {encoder.prefix_length} tokens{mlp}, {trained:,} parameters; "
            f"{frozen_base(model)}"
        )

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write a prefix artefact."""
        save_prefix(
            model, directory, step=state.step, metrics=state.metrics, settings=state.settings
        )
        remove_other_marks(directory, PTUNING)

    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Put the checkpoint's values into the prefix that is attached."""
        encoder = model.prefix_encoder
        assert encoder is not None, "attach ran before"
        load_prefix(
            model,
            directory,
            expected_length=encoder.prefix_length,
            expected_projection=encoder.project,
        )
        loaded = model.prefix_encoder
        assert loaded is not None, "load_prefix attaches one"
        encoder.load_state_dict(loaded.state_dict())
        model.attach_prefix(encoder)

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Take the prefix off inside the block."""
        encoder = model.prefix_encoder
        assert encoder is not None, "attach ran before"
        model.remove_prefix()
        try:
            yield model
        finally:
            model.attach_prefix(encoder)


def open_tuning(config: RunConfig) -> Tuning:
    """Return the kind of tuning that a run asks for; its checkpoint is sound, no base is loaded."""
    check_weights(config.model_name_or_path)
    if config.tuning == LORA:
        from ptuning.tunings.lora import LoraTuning

        return LoraTuning(config)
    if config.tuning == FULL:
        from ptuning.tunings.full import FullTuning

        return FullTuning(config)
    return PrefixTuning(config)


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
    tuning.attach(model)
    if not (config.do_train and shards_weights(arguments)):
        model.to(arguments.device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
    return model


@contextmanager
def checkpoint_explained(flag: str) -> Iterator[None]:
    """Turn a checkpoint's fault into a UsageError that names the flag of the checkpoint."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{flag}: {error}") from error


def frozen_base(model: ChatGLMForConditionalGeneration) -> str:
    """Say how many parameters the frozen base has, and in how many bits quantized ones are."""
    frozen = (p for _, p in model.base_parameters() if not p.requires_grad)
    count = sum(p.numel() for p in frozen)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # stored in bytes of one or two codes each
            count += module.in_features * module.out_features - module.weight.numel()
    bits = model.config.quantization_bit
    return f"the base's {count:,} stay frozen" + (f", its layers in int{bits}" if bits else "")


def newest_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the newest loss, eval_loss and epoch of a trainer's log."""
    return {
        name: float(value)
        for entry in log_history
        for name, value in entry.items()
        if name in ("loss", "eval_loss", "epoch")
    }
