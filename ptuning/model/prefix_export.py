"""A trained prefix for other programs: published .bin, PEFT prefix tuning, keys and values.

Every export is float32. The projection, where there is one, is kept in the published form and
applied in the others. Shapes: P prefix tokens, L layers, H heads, D width of a head, E = H x D.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ptuning.atomic_file import write_atomically
from ptuning.model.config import ChatGLMConfig
from ptuning.model.prefix_artefact import KEY_PREFIX, prefix_shape, read_prefix_tensors
from ptuning.model.prefix_encoder import PrefixEncoder
from ptuning.model.tuned import EXPORT_FORMATS, PUBLISHED_NAME, read_prefix_info

PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
KEY_VALUE_NAME = "prefix_key_values.safetensors"


class PrefixSizes(NamedTuple):
    """The sizes of the base that a prefix belongs to; its table alone does not tell them apart."""

    num_layers: int
    num_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: ChatGLMConfig) -> "PrefixSizes":
        """Return a configuration's sizes."""
        return cls(config.num_layers, config.num_attention_heads, config.head_dim)

    @property
    def table_width(self) -> int:
        """Width 2*L*E of the table."""
        return 2 * self.num_layers * self.num_heads * self.head_dim


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
    files = {"published": published_files, "kv": key_value_files}
    contents = peft_files(encoder, base_name) if form == "peft" else files[form](encoder)
    for name in contents:
        if (destination / name).exists():
            raise FileExistsError(
                f"{destination / name} is already there; give another directory or remove it."
            )
    destination.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(destination / name, content)
    return destination / next(iter(contents))


def read_encoder(path: Path, base: ChatGLMConfig | None = None) -> tuple[PrefixEncoder, str]:
    """Return the prefix at path as an encoder without a model, and its base's name or ""."""
    tensors = read_prefix_tensors(path)
    length, project = prefix_shape(tensors, path)
    info = read_prefix_info(path)
    if info is not None:
        head_dim = info.hidden_size // info.num_attention_heads
        sizes = PrefixSizes(info.num_layers, info.num_attention_heads, head_dim)
    else:
        sizes = PrefixSizes.of(base if base is not None else ChatGLMConfig())
    width = tensors["trans.2.bias"].shape[0] if project else tensors["embedding.weight"].shape[1]
    if width != sizes.table_width:
        raise ValueError(
            f"the prefix at {path} is {width} wide, not {sizes.table_width} (2 x "
            f"{sizes.num_layers} layers x {sizes.num_heads} heads x {sizes.head_dim}); name the "
            "model it was trained on: --model_name_or_path DIRECTORY"
        )
    encoder = PrefixEncoder(
        prefix_length=length,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
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


def published_files(encoder: PrefixEncoder) -> dict[str, bytes]:
    """Return the published pytorch_model.bin: the encoder's tensors under their full names."""
    tensors = {
        KEY_PREFIX + name: value.detach().float().contiguous()
        for name, value in encoder.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return {PUBLISHED_NAME: buffer.getvalue()}


def key_value_files(encoder: PrefixEncoder) -> dict[str, bytes]:
    """Return one safetensors file with `layers.{i}.key` and `layers.{i}.value`, each (H, P, D)."""
    with torch.no_grad():
        pairs = encoder(torch.float32)  # L tensors (2, 1, H, P, D)
    tensors: dict[str, Tensor] = {}
    for index, pair in enumerate(pairs):
        tensors[f"layers.{index}.key"] = pair[0, 0].contiguous()
        tensors[f"layers.{index}.value"] = pair[1, 0].contiguous()
    return {KEY_VALUE_NAME: save(tensors, metadata={"format": "pt"})}


def peft_files(encoder: PrefixEncoder, base_name: str = "") -> dict[str, bytes]:
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
    return {PEFT_WEIGHTS_NAME: weights, PEFT_CONFIG_NAME: text.encode()}
