"""LoRA: low-rank products beside a layer's linears, trained through the peft library; base frozen.

The adapter is float32 whatever the base is, and the base may be quantised.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ptuning.model.adapter import (
    ADAPTER,
    DEFAULT_TARGETS,
    adapter_parameters,
    add_adapter,
    fill_adapter,
    load_adapter,
    load_peft,
    read_adapter_tensors,
    save_adapter,
    without_adapter,
)
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.train.run_config import RunConfig, UsageError
from ptuning.tunings.artefact import LORA, TunedInfo, kind_of
from ptuning.tunings.prefix import base_fingerprint
from ptuning.train.tuning import TrainedState, checkpoint_explained, frozen_base

RANK, ALPHA, DROPOUT = 8, 16.0, 0.1  # what unset flags mean; flags.py says so

logger = logging.getLogger("main")


class LoraTuning:
    """An adapter in the chosen linears of every layer, the base frozen."""

    def __init__(self, config: RunConfig) -> None:
        """Read the adapter to start from once, so that a damaged one is reported before the base
        loads; UsageError, also without the peft library.
        """
        self.config = config
        self.weights = config.model_name_or_path
        self.base: str | None = self.weights
        self.checkpoint = config.checkpoint
        self.fingerprint: str | None = None
        with checkpoint_explained("--tuning is lora"):
            load_peft()
        if self.checkpoint is not None:
            with checkpoint_explained(config.checkpoint_flag):
                read_adapter_tensors(Path(self.checkpoint))

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the frozen base's dtype; the adapter is float32 in any case."""
        return answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Attach the adapter to start from, or a fresh one; freeze the base."""
        config = self.config
        self.fingerprint = base_fingerprint(model)
        if self.checkpoint is not None:
            with checkpoint_explained(config.checkpoint_flag):
                info = load_adapter(model, self.checkpoint, trainable=True)
            step = "" if info.step is None else f", step {info.step}"
            logger.info("Adapter %s%s", self.checkpoint, step)
            return
        targets = config.lora_target_modules
        add_adapter(
            model,
            rank=RANK if config.lora_rank is None else config.lora_rank,
            alpha=ALPHA if config.lora_alpha is None else config.lora_alpha,
            dropout=DROPOUT if config.lora_dropout is None else config.lora_dropout,
            target_modules=DEFAULT_TARGETS if targets is None else targets.split(","),
        )

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Count trained and frozen parameters."""
        adapter = adapter_parameters(model)
        trained = sum(p.numel() for p in adapter.values())
        config: Any = model.peft_config[ADAPTER]
        return (
            f"a LoRA adapter of rank {config.r} on {', '.join(sorted(config.target_modules))}, "
            f"{trained:,} parameters; {frozen_base(model)}"
        )

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write an adapter directory that peft reads too."""
        info = TunedInfo(
            LORA,
            base_model_name_or_path=self.weights,
            base_fingerprint=self.fingerprint,
            trained_parameters=sum(p.numel() for p in adapter_parameters(model).values()),
            step=state.step,
            metrics=state.metrics,
            settings=state.settings,
        )
        save_adapter(model, directory, info, state.tensors)

    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Put the checkpoint's values into the adapter that is attached."""
        kind = kind_of(directory)
        if kind != LORA:
            raise UsageError(f"{directory} is of the kind {kind}, and --tuning is lora.")
        fill_adapter(model, read_adapter_tensors(directory), directory)

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Switch the adapter off inside the block."""
        with without_adapter(model):
            yield model
