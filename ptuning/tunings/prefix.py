"""Prefixes in and out: our directory, a published `pytorch_model.bin`, safetensors, PEFT's files.

An artefact is a self-describing directory with `prefix.safetensors` (published key names, float32)
and `prefix_config.json` (everything needed to use it), which is written last. Exports for other
programs are float32 too; a projection is kept in the published form and applied in the others.
Shapes: P prefix tokens, L layers, H heads, D width of a head, E = H x D hidden size.
"""

import hashlib
import io
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import PREFIX_KEYS, prefix_shapes
from ptuning.model.config import ChatGLMConfig
from ptuning.model.prefix_encoder import PrefixEncoder
from ptuning.storage import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, write_atomically
from ptuning.tunings.artefact import (
    EXPORT_FORMATS,
    PREFIX_CONFIG_NAME,
    PREFIX_WEIGHTS_NAME,
    PUBLISHED_NAME,
    PrefixInfo,
    check_base,
    find_prefix_weights,
    read_prefix_info,
)

KEY_VALUE_NAME = "prefix_key_values.safetensors"


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
    info = _describe(
        model,
        encoder,
        base_model_name_or_path=model.name_or_path or "",
        base_fingerprint=base_fingerprint(model),
        step=step,
        metrics=metrics or {},
        settings=settings or {},
    )
    weights = save(published_tensors(encoder), metadata={"format": "pt"})
    write_atomically(directory / PREFIX_WEIGHTS_NAME, weights)
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2) + "\n"
    write_atomically(directory / PREFIX_CONFIG_NAME, text.encode())
    return info


def _describe(
    model: ChatGLMForConditionalGeneration, encoder: PrefixEncoder, **details: Any
) -> PrefixInfo:
    return PrefixInfo(
        prefix_length=encoder.prefix_length,
        prefix_projection=encoder.project,
        num_layers=model.config.num_layers,
        hidden_size=model.config.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
        vocab_size=model.config.vocab_size,
        **details,
    )


def published_tensors(encoder: PrefixEncoder) -> dict[str, Tensor]:
    """Return the encoder's tensors under their full published names, float32, on the CPU."""
    return {
        PREFIX_KEYS + name: value.detach().float().cpu().contiguous()
        for name, value in encoder.state_dict().items()
    }


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
    if info is not None and not allow_other_base:
        check_base(info, model.name_or_path, base_fingerprint(model), path)
    encoder.load_state_dict(tensors)
    model.attach_prefix(encoder)
    return info or _describe(model, encoder)


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
            f"{file} has no prefix ({PREFIX_KEYS}embedding.weight); it holds "
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
    check_finite(name, value, file)
    return value.float()


def check_finite(name: str, value: Tensor, file: Path) -> None:
    """Refuse a stored tensor with entries that are NaN or infinite (ValueError)."""
    if not value.isfinite().all():
        raise ValueError(
            f"{file} has {name} with entries that are not finite: its training had diverged, so "
            "give an earlier checkpoint."
        )


def prefix_shape(tensors: dict[str, Tensor], path: Path) -> tuple[int, bool]:
    """Return the prefix length and whether there is a projection, read from the shapes."""
    names = set(tensors)
    published = prefix_shapes(ChatGLMConfig(), 1, project=True)
    projection = {name.removeprefix(PREFIX_KEYS) for name in published}
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


def export_prefix(
    prefix: str | Path, destination: str | Path, *, form: str, base: ChatGLMConfig | None = None
) -> Path:
    """Write a prefix into the directory destination in one of EXPORT_FORMATS; return the file.

    base is needed only for a published prefix of a model that is not of ChatGLM-6B's size. An
    existing file of the same name raises FileExistsError; a prefix that cannot be read raises what
    load_prefix raises.
    """
    if form not in EXPORT_FORMATS:
        raise ValueError(f"--format is {form!r}; use one of {', '.join(EXPORT_FORMATS)}.")
    prefix, destination = Path(prefix), Path(destination)
    encoder, base_name = read_encoder(prefix, base)
    if form == "published":
        buffer = io.BytesIO()
        torch.save(published_tensors(encoder), buffer)
        contents = {PUBLISHED_NAME: buffer.getvalue()}
    elif form == "kv":
        contents = {KEY_VALUE_NAME: save(_key_values(encoder), metadata={"format": "pt"})}
    else:
        contents = _peft_files(encoder, base_name)
    for name in contents:
        if (destination / name).exists():
            raise FileExistsError(
                f"{destination / name} is already there; give another directory or remove it."
            )
    for name, content in contents.items():
        write_atomically(destination / name, content)
    return destination / next(iter(contents))


def read_encoder(path: Path, base: ChatGLMConfig | None = None) -> tuple[PrefixEncoder, str]:
    """Return the prefix at path as an encoder without a model, and its base's name or ""."""
    tensors = read_prefix_tensors(path)
    length, project = prefix_shape(tensors, path)
    info = read_prefix_info(path)
    sizes = base or ChatGLMConfig() if info is None else info
    num_layers, num_heads = sizes.num_layers, sizes.num_attention_heads
    head_dim = sizes.hidden_size // num_heads
    table_width = 2 * num_layers * num_heads * head_dim
    width = tensors["trans.2.bias"].shape[0] if project else tensors["embedding.weight"].shape[1]
    if width != table_width:
        raise ValueError(
            f"the prefix at {path} is {width} wide, not {table_width} (2 x {num_layers} layers x "
            f"{num_heads} heads x {head_dim}); name the model it was trained on: "
            "--model_name_or_path DIRECTORY"
        )
    encoder = PrefixEncoder(
        prefix_length=length,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        project=project,
    )
    encoder.load_state_dict(tensors)
    return encoder, "" if info is None else info.base_model_name_or_path


def flat_table(encoder: PrefixEncoder) -> Tensor:
    """Return the (P, 2*L*E) table, projected: layer l's keys at part 2l of 2L, values at 2l+1."""
    with torch.no_grad():
        table = encoder.embedding.weight
        if encoder.trans is not None:
            table = encoder.trans(table)
        return table.detach().float().contiguous()


def _key_values(encoder: PrefixEncoder) -> dict[str, Tensor]:
    """Return `layers.{i}.key` and `layers.{i}.value` of every layer, each (H, P, D)."""
    with torch.no_grad():
        pairs = encoder(torch.float32)  # L tensors (2, 1, H, P, D)
    return {
        f"layers.{index}.{name}": pair[half, 0].contiguous()
        for index, pair in enumerate(pairs)
        for half, name in enumerate(("key", "value"))
    }


def _peft_files(encoder: PrefixEncoder, base_name: str) -> dict[str, bytes]:
    """Return a PEFT prefix-tuning adapter: its config and the table as `prompt_embeddings`.

    PEFT views the table as (P, 2L, H, D) with keys before values, which is the order it has here.
    It keeps a projection only while it trains, so the table is the projected one.
    """
    hidden_size = encoder.num_heads * encoder.head_dim
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_name or None,
        "num_virtual_tokens": encoder.prefix_length,
        "num_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "token_dim": hidden_size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": hidden_size,
        "prefix_projection": False,
    }
    weights = save({"prompt_embeddings": flat_table(encoder)}, metadata={"format": "pt"})
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    return {ADAPTER_WEIGHTS_NAME: weights, ADAPTER_CONFIG_NAME: text.encode()}
