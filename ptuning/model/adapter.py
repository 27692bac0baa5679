"""Adapters on a ChatGLM: new ones, stored ones, and the untouched base; peft provides the layers.

The model stays a ChatGLMForConditionalGeneration whose chosen linears are peft's, so that the
decoding engine and `generate` work unchanged. Weights of an adapter are float32 whatever the base's
are, and the base may be quantised. peft is imported only when an adapter is asked for.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptuning.model.checkpoint.files import check_finite, read_tensors
from ptuning.model.checkpoint.layout import EMBEDDING, check_base
from ptuning.storage import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS_NAME,
    INFO_NAME,
    check_targets,
    read_description,
)

ADAPTER = "default"  # the name inside the model; it is not stored
PEFT_PREFIX = "base_model.model."  # of stored names: peft wraps a model twice


def load_peft() -> ModuleType:
    """Import the peft library; ValueError says how to install it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError(
            f"LoRA needs the peft library ({error.name} is not installed); type: "
            f"{sys.executable} -m pip install 'peft>=0.21'"
        ) from error
    return peft


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> None:
    """Give model a new LoRA adapter and freeze everything else.

    Each target linear's output gains alpha / rank x B(A(x)), with A (rank, in_features) random and
    B (out_features, rank) zero, so that the answers are the base's until it is trained. None
    targets peft's own choice, query_key_value. ValueError for a model that has an adapter, and for
    names that are not a layer's linears.
    """
    if target_modules is not None:
        check_targets(target_modules)
    base = model.name_or_path or ""
    config = load_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules and list(target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute())
        if base and Path(base).is_dir()
        else base,
    )
    _inject(model, config, ADAPTER)


def attach_adapter(
    model: PreTrainedModel, directory: Path, *, name: str = ADAPTER, trainable: bool = False
) -> None:
    """Attach a stored adapter of any of peft's kinds; trainable: it is trained further.

    ValueError where transformers' load_adapter warns of random values or says nothing: an adapter
    that is incomplete, damaged or made for another base.
    """
    peft = load_peft()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"the base of the adapter at {directory} is offloaded, where peft cannot follow; give "
            "a device_map that keeps the whole model in memory."
        )
    config = peft.PeftConfig.from_pretrained(str(directory))
    if (directory / INFO_NAME).is_file():
        info = read_description(directory / INFO_NAME, "tuning")
        if info.get("tuning") == "lora" and config.peft_type == peft.PeftType.LORA:
            base, fingerprint = info.get("base_model_name_or_path"), info.get("base_fingerprint")
            check_base(model, f"the adapter at {directory}", base, fingerprint)
    stored = read_adapter_tensors(directory)
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in stored.items()}
    config.inference_mode = not trainable
    _inject(model, config, name)
    needed = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=EMBEDDING in tensors
    )
    _check_fit(needed, tensors, directory)
    peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    if not trainable:
        model.eval().requires_grad_(False)


def _inject(model: PreTrainedModel, config: Any, name: str) -> None:
    """Put peft's layers around the linears that config names, frozen or quantised ones alike."""
    peft = load_peft()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from ptuning.model.quantization.layers import QuantizedLinear
    from ptuning.model.quantization.lora_linear import QuantizedLoraLinear

    if adapter_parameters(model):
        raise ValueError("this model has a LoRA adapter already; load the base again for another.")
    if isinstance(config, peft.LoraConfig):
        config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    cast_adapter_dtype(model, name)  # to float32


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA adapter's parameters by peft's stored names; empty without one."""
    return {
        stored_name(name): value
        for name, value in model.named_parameters()
        if "lora_" in name and f".{ADAPTER}" in name
    }


def stored_name(name: str) -> str:
    """Return peft's name for an adapter parameter of the model.

    >>> stored_name("transformer.layers.0.attention.dense.lora_A.default.weight")
    'base_model.model.transformer.layers.0.attention.dense.lora_A.weight'
    """
    return PEFT_PREFIX + name.replace(f".{ADAPTER}", "")


def read_adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the stored tensors; ValueError for a damaged file or entries that are not finite."""
    file = next((directory / n for n in ADAPTER_FILES if (directory / n).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has {ADAPTER_CONFIG_NAME} but no {ADAPTER_WEIGHTS_NAME}; copy it again."
        )
    tensors = read_tensors(file)
    for name, value in tensors.items():
        check_finite(name, value, file)
    return tensors


@torch.no_grad()
def fill_adapter(model: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Copy the tensors of directory into the adapter that is attached; ValueError if they differ in
    names or shapes.
    """
    parameters = adapter_parameters(model)
    _check_fit(parameters, tensors, directory)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _check_fit(
    needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: Path
) -> None:
    if needed.keys() != tensors.keys():
        odd = sorted(needed.keys() ^ tensors.keys())
        raise ValueError(
            f"the adapter at {directory} has {len(tensors)} tensors where this model needs "
            f"{len(needed)} (first difference: {odd[0]}); it is incomplete, or was made "
            "for other modules or another model."
        )
    for name, value in needed.items():
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"the adapter at {directory} has {name} of shape {tuple(tensors[name].shape)}; "
                f"this model needs {tuple(value.shape)}: it was trained on another model or "
                "with another rank."
            )


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside the block, so that the model answers as the untouched base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    trained = {p: p.requires_grad for p in model.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)
