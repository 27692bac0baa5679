"""From a name to a model: transformers' loader, fed with tensors that are read on demand.

Everything that can be wrong is found before the first weight is read. The output head is tied to
the embedding when their values are equal, unless tie_word_embeddings is false, and float weights
are quantised as they are read when the configuration asks for it. A model is first built empty,
with the quantised layers that its configuration names, so that the stored tensors fit; quantised
layers are imported only when needed. An adapter's directory loads its base and the adapter on it.
"""

import copy
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ptuning.model.adapter import attach_adapter, load_peft
from ptuning.model.checkpoint.files import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    CheckpointReader,
    StoredTensor,
    find_adapter,
    find_directory,
    same_values,
    shorten,
)
from ptuning.model.checkpoint.layout import (
    EMBEDDING,
    HEAD,
    PREFIX_KEYS,
    SCALE_SUFFIX,
    TIED_SCALE,
    Checkpoint,
    is_layer_linear,
    read_checkpoint,
    read_config,
)
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.reference import packed_columns, quantize_in_blocks
from ptuning.output import bars_for
from ptuning.storage import ADAPTER_CONFIG_NAME, read_json

logger = logging.getLogger(__name__)

# What says where a model is: find_directory's keywords.
LOCATION = ("subfolder", "cache_dir", "force_download", "local_files_only", "token", "revision")
NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "attn_implementation")  # the loader takes these itself


def load_pretrained(
    load: Callable[..., Any], name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
) -> Any:
    """Return a model of the checkpoint at name_or_path, a directory or a hub id.

    load is transformers' `from_pretrained`, bound to the class; kwargs are its arguments and three
    more: quantization_bit=4 or 8 quantises float weights as they are read, quantization_backend
    names what runs them, adapter_name=None attaches no adapter. Raises what `read_checkpoint`
    raises, before any weight is read; never runs code that came with the weights.
    """
    _refuse_arguments(name_or_path, kwargs)
    use_safetensors = kwargs.pop("use_safetensors", None)
    adapter_name = kwargs.pop("adapter_name", "default")
    name_or_path, directory, adapter = _locate(
        name_or_path, use_safetensors, kwargs, with_adapter=adapter_name is not None
    )
    backend = kwargs.pop("quantization_backend", None)
    config, may_lack_head = _settle_config(directory, kwargs.pop("config", None), kwargs)
    unties = config.tie_word_embeddings is False
    config.tie_word_embeddings = may_lack_head
    checkpoint = read_checkpoint(directory, config, use_safetensors=use_safetensors)
    config.tie_word_embeddings = not unties and head_is_embedding(checkpoint)
    _check_device_map(kwargs.get("device_map"), config)
    logger.info("%s: %s", name_or_path, checkpoint)
    if checkpoint.prefix_length is not None and config.pre_seq_len is None:
        logger.warning(
            "%s also holds a trained prefix of %d tokens, which is not loaded with the model; load "
            "it in Python with ptuning.load_prefix(model, %r).",
            name_or_path,
            checkpoint.prefix_length,
            str(directory),
        )
    config.quantization_bit = config.quantization_bit or checkpoint.quantization_bits
    config.embedding_quantization_bit = checkpoint.embedding_bits
    wants_info = kwargs.pop("output_loading_info", False)
    tensors = stored_tensors(
        checkpoint,
        with_prefix=config.pre_seq_len is not None,
        device=_only_device(kwargs.get("device_map")),
    )
    with bars_for(checkpoint.num_bytes):
        kwargs |= {"config": config, "state_dict": tensors, "output_loading_info": True}
        model, info = load(None, *model_args, **kwargs)
    _check_complete(info, directory)
    _share_offloaded_embedding(model)
    if backend is not None:
        set_backend_(model, backend)
    model.config.name_or_path = model.name_or_path = os.fspath(name_or_path)
    if kwargs.get("generation_config") is None and (directory / GENERATION_CONFIG_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    if adapter is not None:
        attach_adapter(model, adapter, name=adapter_name)
        model._hf_peft_config_loaded = True
    return (model, info) if wants_info else model


def _refuse_arguments(name_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Take transformers' arguments that are not supported out of kwargs; ValueError where set."""
    if kwargs.pop("variant", None) is not None:
        raise ValueError("variant is given; ChatGLM-6B has no variants of its files: leave it out.")
    if kwargs.pop("state_dict", None) is not None:
        raise ValueError(
            f"state_dict is given, but the weights are read from {name_or_path}; leave it out, and "
            "call model.load_state_dict(state_dict) on the loaded model."
        )
    if kwargs.pop("ignore_mismatched_sizes", False):
        raise ValueError(
            "ignore_mismatched_sizes is given, but a ChatGLM whose weights do not fit its "
            "config.json is not loaded in part; leave it out, and resize the loaded model, e.g. "
            "with model.resize_token_embeddings."
        )


def _locate(
    name_or_path: str | os.PathLike[str],
    use_safetensors: bool | None,
    kwargs: dict[str, Any],
    *,
    with_adapter: bool,
) -> tuple[str | os.PathLike[str], Path, Path | None]:
    """Return the model's name, its directory, and that of an adapter to attach to the model.

    Takes the arguments that say where out of kwargs. As in transformers, a directory with a model
    and an adapter is the base of its own adapter.
    """
    where = {key: kwargs.pop(key) for key in LOCATION if key in kwargs}
    of_adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
    # An Auto class has found the adapter's base already, and says where the adapter is.
    found_by_auto = of_adapter.pop("_adapter_model_path", None)
    if found_by_auto is None:
        of_adapter = where | of_adapter
    adapter = find_adapter(found_by_auto or name_or_path, **of_adapter) if with_adapter else None
    if adapter is not None:
        load_peft()  # ValueError when it is missing
        own_model = Path(name_or_path, where.get("subfolder", ""), CONFIG_FILE)
        if found_by_auto is None and not own_model.is_file():
            name_or_path = _base_of(adapter)
            where = {key: where[key] for key in where.keys() - {"subfolder", "revision"}}
    try:
        directory = find_directory(name_or_path, use_safetensors=use_safetensors, **where)
    except FileNotFoundError as error:
        if adapter is None:
            raise
        raise FileNotFoundError(
            f"the adapter at {adapter} names {name_or_path} as its base, which cannot be found; "
            f"load the base from where it is now, then call model.load_adapter({str(adapter)!r})."
        ) from error
    return name_or_path, directory, adapter


def _base_of(adapter: Path) -> str:
    """Return the base that an adapter names; ValueError when it names none."""
    file = adapter / ADAPTER_CONFIG_NAME
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"the adapter at {adapter} names no base (base_model_name_or_path in {file}); load its "
            f"base, then call model.load_adapter({str(adapter)!r})."
        )
    return str(base)


def _settle_config(
    directory: Path, given: Any, kwargs: dict[str, Any]
) -> tuple[ChatGLMConfig, bool]:
    """Return the configuration to load with, and whether config.json ties the output head.

    Takes keys of the configuration out of kwargs.
    """
    own = directory / CONFIG_FILE
    tied = given is not None and own.is_file() and read_json(own).get("tie_word_embeddings")
    if isinstance(given, PreTrainedConfig):
        assert isinstance(given, ChatGLMConfig), "transformers picks this class by its config"
        return copy.deepcopy(given), bool(tied or given.tie_word_embeddings)
    config = read_config(directory if given is None else Path(given))
    tied = bool(tied or config.tie_word_embeddings)
    overrides = {
        key: kwargs.pop(key)
        for key in list(kwargs)
        if key not in NOT_OF_THE_CONFIG and hasattr(config, key)
    }
    if overrides:
        config = ChatGLMConfig.from_dict(config.to_dict() | overrides)
    return config, tied or bool(config.tie_word_embeddings)


def _check_device_map(device_map: Any, config: ChatGLMConfig) -> None:
    """Raise ValueError for a split between disk and memory that is not possible."""
    if not isinstance(device_map, dict):
        return
    on_disk = tuple(key and f"{key}." for key, device in device_map.items() if device == "disk")
    if config.tie_word_embeddings and EMBEDDING.startswith(on_disk) != HEAD.startswith(on_disk):
        raise ValueError(
            f"device_map puts one of {EMBEDDING} and {HEAD} on disk, but they are one tensor; put "
            "both there or neither, or load with tie_word_embeddings=False."
        )
    if config.pre_seq_len is not None and PREFIX_KEYS.startswith(on_disk):
        raise ValueError(
            "device_map puts the prefix on disk, from where it is not read; keep "
            "transformer.prefix_encoder in memory."
        )


def _only_device(device_map: Any) -> torch.device | None:
    """Return the device that all weights go to, None when that is the CPU or there are several."""
    if isinstance(device_map, dict) and len(device_map) == 1:
        (device_map,) = device_map.values()
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    if isinstance(device_map, str):
        kind = device_map.partition(":")[0]
        return torch.device(device_map) if kind in ("cuda", "mps", "xpu") else None
    return device_map if isinstance(device_map, torch.device) else None


def stored_tensors(
    checkpoint: Checkpoint, *, with_prefix: bool, device: torch.device | None = None
) -> dict[str, StoredTensor]:
    """Return the checkpoint's tensors, unread, as its configuration wants them.

    A tied head is left out; an untied one that is not stored is a copy of the embedding. The prefix
    is left out unless with_prefix. With quantization_bit, a layer's float weight becomes two
    tensors, quantised on device (None is the CPU) when it is read.
    """
    reader = CheckpointReader(checkpoint.headers)
    bits = checkpoint.config.quantization_bit
    turn = threading.Lock()
    tensors: dict[str, StoredTensor] = {}
    for name, header in checkpoint.headers.items():
        if name.startswith(PREFIX_KEYS) and not with_prefix:
            continue
        if name.startswith(HEAD) and checkpoint.config.tie_word_embeddings:
            continue
        if bits and is_layer_linear(name) and header.dtype.is_floating_point:
            tensors.update(quantized_when_read(reader, name, bits, device=device, turn=turn))
        else:
            tensors[name] = StoredTensor.of(reader, name)
    if HEAD not in checkpoint.headers and not checkpoint.config.tie_word_embeddings:
        for name, stored_name in {HEAD: EMBEDDING, **TIED_SCALE}.items():
            if stored_name in checkpoint.headers:
                tensors[name] = StoredTensor.of(reader, stored_name, copied=True)
    return tensors


def head_is_embedding(checkpoint: Checkpoint) -> bool:
    """Return whether the output head repeats the embedding, or is not stored at all."""
    headers = checkpoint.headers
    if HEAD not in headers:
        return True
    parts = [""]
    if HEAD + SCALE_SUFFIX in headers or EMBEDDING + SCALE_SUFFIX in headers:
        parts.append(SCALE_SUFFIX)
    return all(same_values(headers, HEAD + part, EMBEDDING + part) for part in parts)


def _check_complete(info: dict[str, Any], directory: Path) -> None:
    """Raise ValueError if transformers left anything but a new prefix unfilled."""
    missing = [name for name in info["missing_keys"] if not name.startswith(PREFIX_KEYS)]
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    if missing or mismatched:
        raise ValueError(
            f"{directory} did not fill {shorten(sorted(missing + mismatched))}; the model and its "
            "config.json do not belong together: download both from one place."
        )


def _share_offloaded_embedding(model: PreTrainedModel) -> None:
    """Let a tied head that is offloaded to disk read the embedding's file.

    accelerate finds a file by the parameter's name, and only the embedding's name is stored.
    """
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)
    weights = getattr(getattr(hook, "weights_map", None), "dataset", None)
    index = getattr(weights, "index", {})
    for name, stored_name in {HEAD: EMBEDDING, **TIED_SCALE}.items():
        if stored_name in index:
            index.setdefault(name, index[stored_name])


def prepare_for_config_(model: PreTrainedModel) -> None:
    """Give a new model the empty quantised layers that its configuration calls for, if any.

    With embedding_quantization_bit the (V, E) embedding and the head are quantised as well; tying
    them ties their scales too.
    """
    config = model.config
    if not (config.quantization_bit or config.embedding_quantization_bit):
        return
    from ptuning.model.quantization.layers import (
        QuantizedEmbedding,
        QuantizedLinear,
        prepare_quantized_,
    )

    if config.quantization_bit:
        prepare_quantized_(model, config.quantization_bit)
    if config.embedding_quantization_bit:
        bits = config.embedding_quantization_bit
        table = cast(nn.Embedding, model.get_input_embeddings())
        device, dtype = table.weight.device, table.weight.dtype
        size = (table.num_embeddings, table.embedding_dim)
        model.set_input_embeddings(QuantizedEmbedding(*size, bits=bits, device=device, dtype=dtype))
        head = cast(nn.Linear, model.get_output_embeddings())
        model.set_output_embeddings(QuantizedLinear.empty_like(head, bits))
        model._tied_weights_keys = {**model._tied_weights_keys, **TIED_SCALE}


def set_backend_(model: PreTrainedModel, backend: str) -> None:
    """Run every quantised layer of the model on this back end; ValueError if unknown."""
    from ptuning.model.quantization.backends import check_backend_name
    from ptuning.model.quantization.layers import QuantizedLinear

    check_backend_name(backend)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.backend = backend


def quantized_when_read(
    reader: CheckpointReader,
    name: str,
    bits: int,
    *,
    device: torch.device | None,
    turn: threading.Lock,
) -> dict[str, StoredTensor]:
    """Return the packed weight and its scales in place of a float weight, neither computed yet.

    Both are computed when the first of them is read; the other is kept until it is read too. The
    lock turn is shared by all weights, so that one float weight is in memory at a time.
    """
    header = reader.headers[name]
    halves: dict[int, Tensor] = {}

    def take(half: int) -> Tensor:
        with turn:
            if half not in halves:
                try:
                    pair = quantize_in_blocks(reader.read(name).to(device), bits)
                except ValueError as error:
                    raise ValueError(f"{header.file}: {name}: {error}") from error
                halves.update(enumerate(pair))
            return halves.pop(half)

    shape = (header.shape[0], packed_columns(header.shape[1], bits))
    return {
        name: StoredTensor(torch.int8, shape, lambda: take(0)),
        name + SCALE_SUFFIX: StoredTensor(torch.float16, shape[:1], lambda: take(1)),
    }
