"""Full fine-tuning: every weight of the base is trained, and a checkpoint is a whole model.

While training the weights are float32, the optimizer's own: --bf16 and --fp16 are accelerate's or
DeepSpeed's mixed precision around them, as in the published code. Answers come in the dtype that a
frozen base would have. To compare, the untouched base is loaded again from its files.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.files import INDEX_OF, CheckpointReader
from ptuning.model.checkpoint.layout import base_fingerprint, read_checkpoint
from ptuning.output import bars_for
from ptuning.storage import INFO_NAME
from ptuning.tunings.artefact import (
    FULL,
    Info,
    TrainedState,
    check_kind,
    read_info,
    remove_other_marks,
    write_info,
)
from ptuning.tunings.loading import load_base, load_tokenizer

UNFINISHED = ".unfinished"  # the folder inside an artefact's that is being filled


class FullTuning:
    """Every weight is trained."""

    def __init__(
        self,
        named: str,
        checkpoint: str | None,
        *,
        trains: bool,
        tokenizer_name: str | None = None,
        hub: dict[str, Any] | None = None,
    ) -> None:
        """Find out what is loaded, and the base to compare with.

        named is --model_name_or_path: the base, or a whole model that full fine-tuning wrote, then
        also given as checkpoint. A checkpoint is loaded in place of the base, and names its base.
        hub holds from_pretrained's cache_dir, revision and token.
        """
        self.checkpoint = checkpoint
        self.weights = checkpoint or named
        self.base: str | None = named if trains else None
        self.fingerprint: str | None = None
        self.trains, self.tokenizer_name, self.hub = trains, tokenizer_name, hub or {}
        if checkpoint is not None:
            info = read_info(checkpoint)
            self.base = named if named != checkpoint else None
            if info is not None:
                self.fingerprint = info.base_fingerprint
                self.base = self.base or info.base_model_name_or_path or None

    def check_files(self) -> None:
        """Leave the check to load_base, which refuses a damaged model before it reads a weight."""

    @cached_property
    def tokenizer(self) -> ChatGLMTokenizer:
        """The tokenizer that is written next to the weights."""
        return load_tokenizer(self.tokenizer_name or self.weights, **self.hub)

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return float32 to train in, else the dtype that the model answers in."""
        return torch.float32 if self.trains else answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Let gradients flow to every weight; ValueError for a quantised model."""
        if model.config.quantization_bit or model.config.embedding_quantization_bit:
            raise ValueError(
                f"{self.weights} is stored quantised, and such weights cannot be trained; give the "
                "float16 model, or use --tuning lora."
            )
        model.requires_grad_(True)
        if self.fingerprint is None:
            self.fingerprint = base_fingerprint(model)

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Count the trained parameters."""
        return f"the whole model, {sum(p.numel() for p in model.parameters()):,} parameters"

    def save(
        self, model: ChatGLMForConditionalGeneration, directory: Path, state: TrainedState
    ) -> None:
        """Write a model directory: weights, configuration, tokenizer, and its description last.

        The files are written to a folder inside it and then moved, so that an interrupted write
        leaves the old ones.
        """
        unfinished = directory / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        tensors = None if state.tensors is None else dict(state.tensors)
        try:
            with bars_for(model.get_memory_footprint()):
                model.save_pretrained(unfinished, state_dict=tensors)
            self.tokenizer.save_pretrained(unfinished)
            _move_into_place(unfinished, directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        remove_other_marks(directory, FULL)
        info = Info(
            tuning=FULL,
            base_model_name_or_path=self.base or self.weights,
            base_fingerprint=self.fingerprint,
            trained_parameters=sum(p.numel() for p in model.parameters()),
            step=state.step,
            metrics=state.metrics,
            settings=state.settings,
        )
        write_info(directory, info)

    @torch.no_grad()
    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Copy the checkpoint's weights into the model, one tensor at a time."""
        check_kind(directory, FULL)
        reader = CheckpointReader(read_checkpoint(directory).headers)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Load the base into the memory that the gradients took.

        On an accelerator the tuned weights are moved to the host's memory meanwhile.
        """
        assert self.base is not None, "the caller compares only with a base that is known"
        device = model.device
        model.zero_grad(set_to_none=True)
        if device.type != "cpu":
            model.to("cpu")  # type: ignore[arg-type]  # a wrapped nn.Module.to
        base = load_base(self.base, dtype=model.dtype, **self.hub)
        base.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
        try:
            yield base
        finally:
            del base
            model.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to


def _move_into_place(source: Path, directory: Path) -> None:
    """Flush and move every file; delete weight files that an earlier write left."""
    files = [path for path in source.iterdir() if path.is_file()]
    mode = (source / "config.json").stat().st_mode  # safetensors writes files for their owner only
    for path in files:
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (directory / INFO_NAME).unlink(missing_ok=True)  # incomplete from here on
    weights = [directory / name for pair in INDEX_OF.items() for name in pair]
    for path in (*directory.glob("model-*-of-*.safetensors"), *weights):
        if not (source / path.name).is_file():
            path.unlink(missing_ok=True)
    for path in files:
        os.replace(path, directory / path.name)
