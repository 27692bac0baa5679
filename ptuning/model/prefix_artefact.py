"""Prefixes in and out: our directory, a published `pytorch_model.bin`, or bare safetensors.

An artefact is a self-describing directory with `prefix.safetensors` (published key names, float32)
and `prefix_config.json` (everything needed to use it). Files are written under a temporary name
and renamed, the config last.
Shapes: P prefix tokens, L layers, E hidden size.
"""

import hashlib
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ptuning.atomic_file import write_atomically
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.prefix_encoder import PrefixEncoder
from ptuning.model.tuned import (
    PREFIX_CONFIG_NAME,
    PREFIX_WEIGHTS_NAME,
    PrefixInfo,
    find_prefix_weights,
    read_prefix_info,
)

KEY_PREFIX = "transformer.prefix_encoder."


def base_fingerprint(model: ChatGLMForConditionalGeneration) -> str:
    """Return a short hash of the frozen base, the same in every dtype and at 8 and 4 bits.

    It covers the layer norms and biases, which no quantisation touches, rounded to bfloat16. That
    holds for a base stored in float16, as published: float32 values rounded to float16 first may
    come out one bfloat16 apart.
    """
    digest = hashlib.sha256()
    # LoRA wraps a linear, whose bias is then called base_layer.bias.
    named = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.base_parameters()
        if "lora_" not in name
    }
    for name, parameter in sorted(named.items()):
        if "layernorm" in name or name.endswith(".bias"):
            digest.update(name.encode())
            digest.update(
                parameter.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
            )
    return digest.hexdigest()[:32]


def save_prefix(
    model: ChatGLMForConditionalGeneration,
    directory: str | Path,
    *,
    step: int | None = None,
    metrics: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
) -> PrefixInfo:
    """Write the model's prefix to directory as an artefact and return its description.

    Raises ValueError when the model has no prefix.
    """
    encoder = model.prefix_encoder
    if encoder is None:
        raise ValueError(
            "this model has no prefix to save; give it one with model.add_prefix(prefix_length)."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    info = PrefixInfo(
        prefix_length=encoder.prefix_length,
        prefix_projection=encoder.project,
        num_layers=model.config.num_layers,
        hidden_size=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
        vocab_size=model.config.vocab_size,
        base_model_name_or_path=model.name_or_path or "",
        base_fingerprint=base_fingerprint(model),
        step=step,
        metrics=metrics or {},
        settings=settings or {},
    )
    tensors = {
        KEY_PREFIX + name: value.detach().float().cpu().contiguous()
        for name, value in encoder.state_dict().items()
    }
    write_atomically(directory / PREFIX_WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2) + "\n"
    write_atomically(directory / PREFIX_CONFIG_NAME, text.encode())
    return info


def load_prefix(
    model: ChatGLMForConditionalGeneration,
    path: str | Path,
    *,
    expected_length: int | None = None,
    expected_projection: bool | None = None,
    allow_other_base: bool = False,
) -> PrefixInfo:
    """Attach the prefix at path to model and return its description.

    path is an artefact directory, a directory with a published pytorch_model.bin (prefix keys alone
    or among the whole model's), or one such file or .safetensors file. Length and projection are
    read from the shapes; an expected value that contradicts them raises ValueError, as does a
    prefix made for another base (its sizes, or its fingerprint unless allow_other_base).
    FileNotFoundError when there is no prefix at path.
    """
    path = Path(path)
    tensors = read_prefix_tensors(path)
    length, project = prefix_shape(tensors, path)
    for flag, expected, found in (
        ("--pre_seq_len", expected_length, length),
        ("--prefix_projection", expected_projection, project),
    ):
        if expected is not None and expected != found:
            raise ValueError(
                f"{flag} is {expected}, but the prefix at {path} has {found}; leave {flag} out."
            )
    info = read_prefix_info(path)
    if info is not None and (info.prefix_length, info.prefix_projection) != (length, project):
        raise ValueError(
            f"{path} says prefix_length {info.prefix_length}, prefix_projection "
            f"{info.prefix_projection} in {PREFIX_CONFIG_NAME}, but {PREFIX_WEIGHTS_NAME} has "
            f"{length}, {project}: they were not written together, so give another checkpoint."
        )
    encoder = model.transformer.new_prefix_encoder(length, project=project)
    _check_sizes(model, encoder, tensors, info, path)
    if not allow_other_base:
        _check_fingerprint(model, info, path)
    encoder.load_state_dict(tensors)
    model.attach_prefix(encoder)
    return info or PrefixInfo(
        prefix_length=length,
        prefix_projection=project,
        num_layers=model.config.num_layers,
        hidden_size=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
        vocab_size=model.config.vocab_size,
    )


def read_prefix_tensors(path: Path) -> dict[str, Tensor]:
    """Return the prefix tensors at path by short name (`embedding.weight`), float32, CPU."""
    file = find_prefix_weights(path)
    try:
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as a prefix ({type(error).__name__}): it is damaged, cut "
            "short, or holds more than tensors; copy it again or give another checkpoint."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{file} does not hold named tensors but a {type(loaded).__name__}; give a P-Tuning v2 "
            "checkpoint."
        )
    tensors = {}
    for name, value in loaded.items():
        short = name.rpartition("prefix_encoder.")[2]
        if "prefix_encoder." in name or short == "embedding.weight" or short.startswith("trans."):
            tensors[short] = _checked_tensor(name, value, file)
    if "embedding.weight" not in tensors:
        raise ValueError(
            f"{file} has no prefix ({KEY_PREFIX}embedding.weight); it holds "
            f"{', '.join(sorted(loaded)[:3]) or 'nothing'}...: give a P-Tuning v2 checkpoint."
        )
    return tensors


def _checked_tensor(name: str, value: Any, file: Path) -> Tensor:
    """Return value in float32; ValueError for what cannot be a weight of a prefix."""
    num_axes = 1 if name.endswith(".bias") else 2
    if not isinstance(value, Tensor) or value.dim() != num_axes or value.numel() == 0:
        what = (
            f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "that is no tensor"
        )
        raise ValueError(
            f"{file} does not hold a prefix: it has {name} {what}, and needed are {num_axes} axes "
            "with something in them; give a P-Tuning v2 checkpoint."
        )
    if not value.isfinite().all():
        raise ValueError(
            f"{file} has {name} with entries that are not finite: its training had diverged, so "
            "give an earlier checkpoint."
        )
    return value.float()


def prefix_shape(tensors: dict[str, Tensor], path: Path) -> tuple[int, bool]:
    """Return the prefix length and whether there is a projection, read from the shapes."""
    names = set(tensors)
    projection = {
        "embedding.weight",
        "trans.0.weight",
        "trans.0.bias",
        "trans.2.weight",
        "trans.2.bias",
    }
    if names not in ({"embedding.weight"}, projection):
        raise ValueError(
            f"the prefix at {path} has the tensors {sorted(names)}; needed are embedding.weight "
            f"alone or, with a projection, {sorted(projection)}."
        )
    return tensors["embedding.weight"].shape[0], names == projection


def _check_sizes(
    model: ChatGLMForConditionalGeneration,
    encoder: PrefixEncoder,
    tensors: dict[str, Tensor],
    info: PrefixInfo | None,
    path: Path,
) -> None:
    """Refuse tensors that do not fit encoder, which is built for this model."""
    config = model.config
    sizes = f"{config.num_layers} layers of {config.hidden_size}"
    for name, value in encoder.state_dict().items():
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"the prefix at {path} has {name} of shape {tuple(tensors[name].shape)}; this base "
                f"of {sizes} needs {tuple(value.shape)}: it was trained on another model, so load "
                "that one."
            )
    if info is not None and info.num_attention_heads != config.num_attention_heads:
        raise ValueError(
            f"the prefix at {path} is for {info.num_attention_heads} heads; this base of {sizes} "
            f"has {config.num_attention_heads}: it was trained on another model, so load that one."
        )


def _check_fingerprint(
    model: ChatGLMForConditionalGeneration, info: PrefixInfo | None, path: Path
) -> None:
    """Refuse a prefix that says it was trained on another base."""
    if info is None or info.base_fingerprint is None:
        return
    fingerprint = base_fingerprint(model)
    if info.base_fingerprint != fingerprint:
        raise ValueError(
            f"the prefix at {path} was trained on {info.base_model_name_or_path or 'a base'} "
            f"(fingerprint {info.base_fingerprint[:8]}), but this base {model.name_or_path} has "
            f"{fingerprint[:8]}; load the base it was trained on, or pass allow_other_base=True to "
            "try it anyway."
        )
