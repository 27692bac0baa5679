"""Full fine-tuning: every weight of the base is trained, and a checkpoint is a whole model.

While training the weights are float32, the optimiser's own: --bf16 and --fp16 are accelerate's or
DeepSpeed's mixed precision around them, as in the published code. Answers come in the dtype that a
frozen base would have. The untouched base is read anew from where it lies, so nothing is kept of
it while training.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.files import BIN_INDEX, INDEX_OF, SAFETENSORS_INDEX, CheckpointReader
from ptuning.model.checkpoint.layout import read_checkpoint
from ptuning.output import bars_for
from ptuning.storage import INFO_NAME
from ptuning.train.run_config import RunConfig, UsageError
from ptuning.tunings.artefact import FULL, TunedInfo, kind_of, read_tuned_info, write_tuned_info
from ptuning.tunings.loading import load_base, load_tokenizer
from ptuning.tunings.prefix import base_fingerprint
from ptuning.train.tuning import TrainedState

UNFINISHED = ".unfinished"  # the folder inside an artefact's that is being filled

logger = logging.getLogger("main")


class FullTuning:
    """Every weight is trained."""

    def __init__(self, config: RunConfig) -> None:
        """Find out what is loaded, and the base to compare with.

        A checkpoint is a whole model that is used instead of the base, and names its base. A
        --model_name_or_path that full fine-tuning wrote is a checkpoint itself.
        """
        self.config = config
        self.checkpoint = config.checkpoint
        self.weights = self.checkpoint or config.model_name_or_path
        self.base: str | None = config.model_name_or_path if config.do_train else None
        self.fingerprint: str | None = None
        if self.checkpoint is not None:
            info = read_tuned_info(self.checkpoint)
            named = config.model_name_or_path
            self.base = named if named != self.checkpoint else None
            if isinstance(info, TunedInfo):
                self.fingerprint = info.base_fingerprint
                self.base = self.base or info.base_model_name_or_path or None

    @cached_property
    def tokenizer(self) -> ChatGLMTokenizer:
        """The tokenizer that is written beside the weights."""
        return load_tokenizer(self.config.tokenizer_name or self.weights, **self.config.hub)

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return float32 to train in, else the dtype that the model answers in."""
        return torch.float32 if self.config.do_train else answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Let gradients flow to every weight; UsageError for a quantised model."""
        config = model.config
        if config.quantization_bit or config.embedding_quantization_bit:
            raise UsageError(
                f"--tuning is full, but {self.weights} is stored quantised, and such weights "
                "cannot be trained; give the float16 model, or use --tuning lora."
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

        The files are written in a folder of their own inside and then moved, so that a run that is
        stopped in between leaves the old ones.
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
        info = TunedInfo(
            FULL,
            base_model_name_or_path=self.base or self.weights,
            base_fingerprint=self.fingerprint,
            trained_parameters=sum(p.numel() for p in model.parameters()),
            step=state.step,
            metrics=state.metrics,
            settings=state.settings,
        )
        write_tuned_info(directory, info)

    @torch.no_grad()
    def restore(self, model: ChatGLMForConditionalGeneration, directory: Path) -> None:
        """Copy the checkpoint's weights into the model, one tensor at a time."""
        kind = kind_of(directory)
        if kind != FULL:
            raise UsageError(f"{directory} is of the kind {kind}, and --tuning is full.")
        headers = read_checkpoint(directory).headers
        reader = CheckpointReader(headers)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Read the base from where it lies, in the room of the gradients.

        On an accelerator the tuned weights wait in the computer's memory meanwhile.
        """
        assert self.base is not None, "main.py compares only with a base that is known"
        device = model.device
        model.zero_grad(set_to_none=True)
        if device.type != "cpu":
            model.to("cpu")  # type: ignore[arg-type]  # a wrapped nn.Module.to
        base = load_base(self.base, dtype=model.dtype, **self.config.hub)
        base.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to
        try:
            yield base
        finally:
            del base
            model.to(device)  # type: ignore[arg-type]  # a wrapped nn.Module.to


def _move_into_place(source: Path, directory: Path) -> None:
    """Flush and move every file, and delete weight files of an earlier write that are not among
    them.
    """
    files = [path for path in source.iterdir() if path.is_file()]
    mode = (source / "config.json").stat().st_mode  # safetensors writes files for their owner only
    for path in files:
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (directory / INFO_NAME).unlink(missing_ok=True)  # not a whole artefact from here on
    names = {path.name for path in files}
    stale = {*INDEX_OF, BIN_INDEX, SAFETENSORS_INDEX} - names
    shards = {*directory.glob("model-*-of-*.safetensors"), *(directory / name for name in stale)}
    for path in shards:
        if path.name not in names:
            path.unlink(missing_ok=True)
    for path in files:
        os.replace(path, directory / path.name)
