"""LoRA: low-rank updates to the linear layers of a frozen base, trained with the peft library.

A directory holds `adapter_model.safetensors` and `adapter_config.json` as peft reads them, and
tuning_config.json, which describes the run.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ptuning.model.adapter import (
    ADAPTER,
    adapter_parameters,
    add_adapter,
    attach_adapter,
    fill_adapter,
    load_peft,
    read_adapter_tensors,
    stored_name,
    without_adapter,
)
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.storage import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, write_atomically
from ptuning.tunings.artefact import (
    DEFAULT_TARGETS,
    LORA,
    Info,
    TrainedState,
    check_kind,
    read_info,
    remove_other_marks,
    write_info,
)
from ptuning.tunings.loading import describe_frozen

RANK, ALPHA, DROPOUT = 8, 16.0, 0.1  # what unset flags mean; flags.py says so

logger = logging.getLogger("main")


class LoraTuning:
    """An adapter in the chosen linears of every layer, float32; the base is frozen."""

    def __init__(
        self,
        base: str,
        checkpoint: str | None,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        target_modules: Sequence[str] | None = None,
    ) -> None:
        """Start from a checkpoint, or from a new adapter of these values; None is the default."""
        self.weights = base
        self.base: str | None = base
        self.checkpoint = checkpoint
        self.fingerprint: str | None = None
        self.rank = RANK if rank is None else rank
        self.alpha = ALPHA if alpha is None else alpha
        self.dropout = DROPOUT if dropout is None else dropout
        self.target_modules = DEFAULT_TARGETS if target_modules is None else target_modules

    def check_files(self) -> None:
        """Refuse a damaged checkpoint, and a machine without the peft library."""
        load_peft()
        if self.checkpoint is not None:
            read_adapter_tensors(Path(self.checkpoint))

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the frozen base's dtype."""
        return answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Attach the adapter to start from, or a new one; freeze the base."""
        self.fingerprint = base_fingerprint(model)
        if self.checkpoint is None:
            add_adapter(
                model,
                rank=self.rank,
                alpha=self.alpha,
                dropout=self.dropout,
                target_modules=self.target_modules,
            )
            return
        info = load_adapter(model, self.checkpoint, trainable=True)
        step = "" if info.step is None else f", step {info.step}"
        logger.info("Adapter %s%s", self.checkpoint, step)

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Count trained and frozen parameters."""
        config: Any = model.peft_config[ADAPTER]
        return (
            f"a LoRA adapter of rank {config.r} on {', '.join(sorted(config.target_modules))}, "
            f"{_count_trained(model):,} parameters; {describe_frozen(model)}"
        )

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write an adapter directory that peft reads too."""
        info = Info(
            tuning=LORA,
            base_model_name_or_path=self.weights,
            base_fingerprint=self.fingerprint,
            trained_parameters=_count_trained(model),
            step=state.step,
            metrics=state.metrics,
            settings=state.settings,
        )
        save_adapter(model, directory, info, state.tensors)

    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Put the checkpoint's values into the adapter that is attached."""
        check_kind(directory, LORA)
        fill_adapter(model, read_adapter_tensors(directory), directory)

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Switch the adapter off inside the block."""
        with without_adapter(model):
            yield model


def _count_trained(model: ChatGLMForConditionalGeneration) -> int:
    return sum(p.numel() for p in adapter_parameters(model).values())


def save_adapter(
    model: ChatGLMForConditionalGeneration,
    directory: str | Path,
    info: Info,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter to directory, its description last.

    tensors are the model's by name where they were gathered from several processes; None takes the
    model's own. ValueError when the model has no adapter.
    """
    directory = Path(directory)
    values: dict[str, Tensor] = dict(adapter_parameters(model))
    if not values:
        raise ValueError("this model has no adapter to save; give it one with add_adapter.")
    if tensors is not None:
        values = {stored_name(k): v for k, v in tensors.items() if stored_name(k) in values}
    stored = {name: value.detach().float().cpu().contiguous() for name, value in values.items()}
    write_atomically(directory / ADAPTER_WEIGHTS_NAME, save(stored, metadata={"format": "pt"}))
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True  # as peft stores it
    config.save_pretrained(directory)
    remove_other_marks(directory, LORA)
    write_info(directory, info)


def load_adapter(
    model: ChatGLMForConditionalGeneration, directory: str | Path, *, trainable: bool = False
) -> Info:
    """Attach the LoRA adapter in directory to its base and return its description.

    trainable keeps its dropout and lets gradients flow to it; else it is frozen. ValueError when it
    was made for another base or is damaged; FileNotFoundError when there is none.
    """
    directory = Path(directory)
    info = read_info(directory)
    if info is None or info.tuning != LORA:
        raise ValueError(f"{directory} holds no LoRA adapter ({ADAPTER_CONFIG_NAME}).")
    attach_adapter(model, directory, trainable=trainable)
    return info
