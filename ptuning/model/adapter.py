"""LoRA adapters on a ChatGLM: given, written, read, put aside; the peft library does the layers.

The model stays a ChatGLMForConditionalGeneration whose chosen linears are peft's, so that the
decoding engine and `generate` work unchanged. A directory holds `adapter_model.safetensors` and
`adapter_config.json` as peft reads them, and tuning_config.json with what the run was.
peft is imported when an adapter is asked for, never before.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.files import map_bin, open_safetensors
from ptuning.model.checkpoint.layout import EMBEDDING
from ptuning.model.quantization.layers import QuantizedLinear, lora_linear_class
from ptuning.storage import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS_NAME,
    write_atomically,
)
from ptuning.tunings.artefact import (
    DEFAULT_TARGETS,
    LORA,
    TunedInfo,
    check_base,
    check_targets,
    read_tuned_info,
    write_tuned_info,
)
from ptuning.tunings.prefix import base_fingerprint, check_finite

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
    model: ChatGLMForConditionalGeneration,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
) -> None:
    """Give model a fresh float32 adapter and freeze everything else.

    Each target linear's output gains alpha / rank x B(A(x)), with A (rank, in_features) random and
    B (out_features, rank) zero, so that the model's answers are the base's until it is trained.
    ValueError for names that are not a layer's linears, and for a model that has an adapter.
    """
    check_targets(target_modules)
    base = model.name_or_path or ""
    config = load_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute())
        if base and Path(base).is_dir()
        else base,
    )
    _inject(model, config)


def _inject(model: ChatGLMForConditionalGeneration, config: Any) -> None:
    """Put peft's layers around the linears that config names, frozen or quantised ones alike."""
    peft = load_peft()
    if adapter_parameters(model):
        raise ValueError("this model has a LoRA adapter already; load the base again for another.")
    _adapt_quantized(config)
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()  # like the prefix, whatever the base is


def _adapt_quantized(config: Any) -> None:
    """Tell peft which LoRA layer wraps our quantised linears."""
    config._register_custom_module({QuantizedLinear: lora_linear_class()})


def adapter_parameters(model: ChatGLMForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by peft's stored names; empty for a model without one."""
    return {
        _stored_name(name): value
        for name, value in model.named_parameters()
        if "lora_" in name and f".{ADAPTER}" in name
    }


def _stored_name(name: str) -> str:
    """Return peft's name for an adapter parameter of the model.

    >>> _stored_name("transformer.layers.0.attention.dense.lora_A.default.weight")
    'base_model.model.transformer.layers.0.attention.dense.lora_A.weight'
    """
    return PEFT_PREFIX + name.replace(f".{ADAPTER}", "")


def save_adapter(
    model: ChatGLMForConditionalGeneration,
    directory: str | Path,
    info: TunedInfo,
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
        values = {_stored_name(k): v for k, v in tensors.items() if _stored_name(k) in values}
    stored = {name: value.detach().float().cpu().contiguous() for name, value in values.items()}
    write_atomically(directory / ADAPTER_WEIGHTS_NAME, save(stored, metadata={"format": "pt"}))
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True  # as peft stores it: whoever loads it is not training
    config.save_pretrained(directory)
    write_tuned_info(directory, info)


def load_adapter(
    model: ChatGLMForConditionalGeneration, directory: str | Path, *, trainable: bool = False
) -> TunedInfo:
    """Attach the adapter in directory to its base and return its description.

    trainable keeps its dropout and lets gradients flow to it; else it is frozen. ValueError when it
    was made for another base or is damaged; FileNotFoundError when there is none.
    """
    directory = Path(directory)
    info = read_tuned_info(directory)
    if not isinstance(info, TunedInfo) or info.tuning != LORA:
        raise ValueError(f"{directory} holds no LoRA adapter ({ADAPTER_CONFIG_NAME}).")
    check_base(info, model.name_or_path, base_fingerprint(model), directory)
    tensors = read_adapter_tensors(directory)
    config = load_peft().LoraConfig.from_pretrained(str(directory))
    config.inference_mode = not trainable
    _inject(model, config)
    fill_adapter(model, tensors, directory)
    return info


def attach_adapter(model: ChatGLMForConditionalGeneration, directory: Path, *, name: str) -> None:
    """Attach an adapter of any of peft's kinds, frozen; the base may be quantised.

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
    if config.peft_type == peft.PeftType.LORA:
        info = read_tuned_info(directory)
        if isinstance(info, TunedInfo) and info.tuning == LORA:
            check_base(info, model.name_or_path, base_fingerprint(model), directory)
    stored = read_adapter_tensors(directory)
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in stored.items()}
    if isinstance(config, peft.LoraConfig):
        _adapt_quantized(config)
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    needed = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=EMBEDDING in tensors
    )
    _check_fit(needed, tensors, directory)
    peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    model.eval().requires_grad_(False)
    model._hf_peft_config_loaded = True


def read_adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the stored tensors; ValueError for a damaged file or entries that are not finite."""
    file = next((directory / n for n in ADAPTER_FILES if (directory / n).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has {ADAPTER_CONFIG_NAME} but no {ADAPTER_WEIGHTS_NAME}; copy it again."
        )
    if file.suffix == ".bin":
        tensors = map_bin(file)
    else:
        with open_safetensors(file) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, value in tensors.items():
        check_finite(name, value, file)
    return tensors


@torch.no_grad()
def fill_adapter(
    model: ChatGLMForConditionalGeneration, tensors: Mapping[str, Tensor], directory: Path
) -> None:
    """Copy stored values into the adapter that is attached; ValueError where they do not fit."""
    parameters = adapter_parameters(model)
    _check_fit(parameters, tensors, directory)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _check_fit(
    needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: Path
) -> None:
    """Raise ValueError where the stored tensors are not those that the model needs."""
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
def without_adapter(model: ChatGLMForConditionalGeneration) -> Iterator[None]:
    """Answer as the untouched base inside the block; the adapter is on again after it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
