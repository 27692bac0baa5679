"""P-Tuning v2: the prefix as a Tuning, and its files (ours, published, for other programs).

An artefact is a self-describing directory with `prefix.safetensors` (published key names, float32)
and `prefix_config.json` (everything needed to use it), which is written last. Exports for other
programs are float32 too; a projection is kept in the published form and applied in the others.
Shapes: P prefix tokens, L layers, H heads, D width of a head, E = H x D hidden size.
"""

import io
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.files import check_finite, check_first_bytes, read_tensors, shorten
from ptuning.model.checkpoint.layout import (
    PREFIX_KEYS,
    base_fingerprint,
    check_base,
    prefix_shapes,
)
from ptuning.model.config import ChatGLMConfig
from ptuning.model.prefix_encoder import PrefixEncoder
from ptuning.storage import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, write_atomically
from ptuning.tunings.artefact import (
    EXPORT_FORMATS,
    PREFIX_CONFIG_NAME,
    PREFIX_WEIGHTS_NAME,
    PTUNING,
    PUBLISHED_NAME,
    Info,
    TrainedState,
    find_prefix_weights,
    read_prefix_info,
    remove_other_marks,
    write_info,
)
from ptuning.tunings.loading import describe_frozen

KEY_VALUE_NAME = "prefix_key_values.safetensors"

logger = logging.getLogger("main")


class PrefixTuning:
    """A prefix of keys and values in every layer, float32; the base is frozen."""

    def __init__(
        self,
        base: str,
        checkpoint: str | None,
        *,
        length: int | None = None,
        project: bool | None = None,
        init_std: float | None = None,
    ) -> None:
        """Start from a checkpoint, which length and project must agree with, or from a new prefix
        of these values, its table scaled to init_std.
        """
        self.weights = base
        self.base: str | None = base
        self.checkpoint = checkpoint
        self.length, self.project, self.init_std = length, project, init_std

    def check_files(self) -> None:
        """Refuse a damaged checkpoint."""
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
            prefix_shape(read_prefix_tensors(path), path)

    def load_dtype(self, answering: torch.dtype) -> torch.dtype:
        """Return the frozen base's dtype."""
        return answering

    def attach(self, model: ChatGLMForConditionalGeneration) -> None:
        """Attach the prefix to start from, or a new one; freeze the base."""
        if self.checkpoint is not None:
            info = load_prefix(
                model,
                self.checkpoint,
                expected_length=self.length,
                expected_projection=self.project,
            )
            step = "" if info.step is None else f", step {info.step}"
            logger.info("Prefix %s: %d tokens%s", self.checkpoint, info.prefix_length, step)
        else:
            encoder = model.add_prefix(int(self.length or 0), project=bool(self.project))
            if self.init_std is not None:
                encoder.scale_entries(self.init_std)
        model.freeze_base()

    def describe(self, model: ChatGLMForConditionalGeneration) -> str:
        """Count prefix tokens, trained and frozen parameters."""
        encoder = _attached(model)
        trained = sum(p.numel() for p in encoder.parameters())
        mlp = " through an MLP" if encoder.project else ""
        return (
            f"a prefix of {encoder.prefix_length} tokens{mlp}, {trained:,} parameters; "
            f"{describe_frozen(model)}"
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
        encoder = _attached(model)
        stored, _ = _read_for(
            model,
            directory,
            expected_length=encoder.prefix_length,
            expected_projection=encoder.project,
        )
        encoder.load_state_dict(stored.state_dict())

    @contextmanager
    def untuned(
        self, model: ChatGLMForConditionalGeneration
    ) -> Iterator[ChatGLMForConditionalGeneration]:
        """Detach the prefix inside the block."""
        encoder = _attached(model)
        model.remove_prefix()
        try:
            yield model
        finally:
            model.attach_prefix(encoder)


def _attached(model: ChatGLMForConditionalGeneration) -> PrefixEncoder:
    assert model.prefix_encoder is not None, "attach ran before"
    return model.prefix_encoder


def save_prefix(
    model: ChatGLMForConditionalGeneration,
    directory: str | Path,
    *,
    step: int | None = None,
    metrics: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
) -> Info:
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
    write_info(directory, info)
    return info


def _describe(
    model: ChatGLMForConditionalGeneration, encoder: PrefixEncoder, **details: Any
) -> Info:
    return Info(
        tuning=PTUNING,
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
) -> Info:
    """Attach the prefix at path to model and return its description.

    path is an artefact directory, a directory with a published pytorch_model.bin (prefix keys alone
    or among the whole model's), or one such file or .safetensors file. Length and projection are
    read from the shapes; an expected value that contradicts them raises ValueError, as does a
    prefix made for another base (its sizes, or its fingerprint unless allow_other_base).
    FileNotFoundError when there is no prefix at path.
    """
    encoder, info = _read_for(
        model,
        Path(path),
        expected_length=expected_length,
        expected_projection=expected_projection,
        allow_other_base=allow_other_base,
    )
    model.attach_prefix(encoder)
    return info or _describe(model, encoder)


def _read_for(
    model: ChatGLMForConditionalGeneration,
    path: Path,
    *,
    expected_length: int | None,
    expected_projection: bool | None,
    allow_other_base: bool = False,
) -> tuple[PrefixEncoder, Info | None]:
    """Return the prefix at path, checked to fit model, and its description if it has one."""
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
    other = "it was trained on another model, so load that one."
    encoder = _encoder_of(tensors, path, model.config, remedy=other)
    if info is not None and info.num_attention_heads != encoder.num_heads:
        raise ValueError(
            f"the prefix at {path} is for {info.num_attention_heads} heads; this base has "
            f"{encoder.num_heads}: {other}"
        )
    if info is not None and not allow_other_base:
        check_base(
            model,
            f"the prefix at {path}",
            info.base_model_name_or_path,
            info.base_fingerprint,
            hint=", or pass allow_other_base=True to try it anyway",
        )
    return encoder, info


def _encoder_of(
    tensors: dict[str, Tensor], path: Path, sizes: ChatGLMConfig | Info, *, remedy: str
) -> PrefixEncoder:
    """Return an encoder with these tensors; ValueError unless they fit a base of these sizes."""
    length, project = prefix_shape(tensors, path)
    encoder = PrefixEncoder(
        prefix_length=length,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_attention_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        project=project,
    )
    for name, value in encoder.state_dict().items():
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"the prefix at {path} has {name} of shape {tuple(tensors[name].shape)}; a base of "
                f"{sizes.num_layers} layers of {sizes.hidden_size} needs {tuple(value.shape)}: "
                f"{remedy}"
            )
    encoder.load_state_dict(tensors)
    return encoder


def read_prefix_tensors(path: Path) -> dict[str, Tensor]:
    """Return the prefix tensors at path by short name (`embedding.weight`), float32, CPU."""
    file = find_prefix_weights(path)
    stored = _read_stored(file)
    tensors = {}
    for name, value in stored.items():
        short = name.rpartition("prefix_encoder.")[2]
        if short == "embedding.weight" or short.startswith("trans.") or short != name:
            tensors[short] = _checked_tensor(name, value, file)
    if "embedding.weight" not in tensors:
        raise ValueError(
            f"{file} has no prefix ({PREFIX_KEYS}embedding.weight); it holds "
            f"{shorten(sorted(map(str, stored))) or 'nothing'}: give a P-Tuning v2 checkpoint."
        )
    return tensors


def _read_stored(file: Path) -> dict[str, Any]:
    """Return what a weight file holds; a .bin of any age may hold more than tensors."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    check_first_bytes(file)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged, or holds more than tensors, which could run "
            "code; copy or download it again from a source you trust."
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(
            f"{file} does not hold named tensors but a {type(stored).__name__}; give a P-Tuning v2 "
            "checkpoint."
        )
    return stored


def _checked_tensor(name: str, value: Any, file: Path) -> Tensor:
    """Return value in float32; ValueError for what cannot be a weight of a prefix."""
    num_axes = 1 if name.endswith(".bias") else 2
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.dim() != num_axes or value.numel() == 0:
        raise ValueError(
            f"{file} does not hold a prefix: it has {name} of shape {shape}, and "
            f"{num_axes} non-empty axes are needed; give a P-Tuning v2 checkpoint."
        )
    check_finite(name, value, file)
    return value.float()


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
    info = read_prefix_info(path)
    remedy = "name the model it was trained on: --model_name_or_path DIRECTORY"
    sizes = info or base or ChatGLMConfig()
    encoder = _encoder_of(read_prefix_tensors(path), path, sizes, remedy=remedy)
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
    """Return a peft prefix-tuning adapter: its config and the table as `prompt_embeddings`.

    peft views the table as (P, 2L, H, D) with keys before values, which is the order it has here.
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
