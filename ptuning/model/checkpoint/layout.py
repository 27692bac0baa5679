"""A checkpoint on disk: the tensors that it must hold, checked before any weight is read.

Published shards, slim int8 and int4 releases and safetensors are read alike. A quantised release
stores the four linear weights of a layer as int8 (two columns per byte at 4 bits) with one float16
scale per row; the `-int4-qe` release does the same to the embedding and the output head.
Source of the names:
https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/pytorch_model.bin.index.json
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ptuning.model.checkpoint.files import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TensorHeader,
    find_weight_files,
    read_headers,
    shorten,
)
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.reference import check_bits, packed_columns
from ptuning.storage import LAYER_LINEARS, read_json

logger = logging.getLogger(__name__)

EMBEDDING = "transformer.word_embeddings.weight"
HEAD = "lm_head.weight"
PREFIX_KEYS = "transformer.prefix_encoder."
SCALE_SUFFIX = "_scale"  # a quantised `x.weight` has its scales in `x.weight_scale`
NOT_LOADED = ".rotary_emb.inv_freq"  # stored by the published code, computed here
# A tied head shares the scale too; transformers must know, or it refuses to save the model.
TIED_SCALE = {HEAD + SCALE_SUFFIX: EMBEDDING + SCALE_SUFFIX}

Shape = tuple[int, ...]
_LINEAR_WEIGHT = re.compile(
    rf"transformer\.layers\.\d+\.(?:{'|'.join(map(re.escape, LAYER_LINEARS))})\.weight"
)

OLDER_VOCABULARY = 150528  # the older release: 20,000 image tokens come first
OLDER_NUM_IMAGE_TOKENS = 20_000


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: every tensor its model needs is there, in the right shape.

    headers holds the tensors of the model and of a prefix, num_bytes is the size of all that are
    stored. quantization_bits and embedding_bits are 0 for floats; prefix_length is None without a
    prefix among the weights.
    """

    directory: Path
    config: ChatGLMConfig
    headers: dict[str, TensorHeader]
    release: str
    num_shards: int
    num_bytes: int
    quantization_bits: int
    embedding_bits: int
    prefix_length: int | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the norms, the embedding and the weights, unless these are quantised."""
        return self.headers["transformer.final_layernorm.weight"].dtype

    def __str__(self) -> str:
        """Describe the checkpoint in one line."""
        weights = f"int{self.quantization_bits}" if self.quantization_bits else str(self.dtype)[6:]
        embedding = f", int{self.embedding_bits} embedding" if self.embedding_bits else ""
        shards = "1 file" if self.num_shards == 1 else f"{self.num_shards} files"
        size = f"{self.num_bytes / 1e6:.1f} MB"
        if self.num_bytes >= 1e8:
            size = f"{self.num_bytes / 1e9:.2f} GB"
        return f"{self.release}; {weights} weights{embedding}, {size} in {shards}"


def read_checkpoint(
    directory: str | Path,
    config: ChatGLMConfig | None = None,
    *,
    use_safetensors: bool | None = None,
) -> Checkpoint:
    """Return the checked checkpoint in directory; config is read from it unless given.

    No weight is read. FileNotFoundError names a missing file; ValueError a damaged file, a missing
    tensor or one of the wrong shape, or another model's checkpoint.
    """
    directory = Path(directory)
    weight_files = find_weight_files(directory, use_safetensors=use_safetensors)
    if config is None:
        config = read_config(directory)
    headers = read_headers(weight_files)
    bits, embedding_bits = _stored_bits(directory, headers, config)
    expected = _expected_shapes(headers, config, bits)
    prefix_length = _add_prefix(expected, headers, config)
    _check_tensors(directory, headers, expected)
    unknown = sorted(
        name for name in headers.keys() - expected.keys() if not name.endswith(NOT_LOADED)
    )
    if unknown:
        logger.warning(
            "%s also holds %s, which ChatGLM-6B does not have; not loaded.",
            directory,
            shorten(unknown),
        )
    return Checkpoint(
        directory,
        config,
        {name: headers[name] for name in expected},
        release=release_name(config, _num_image_tokens(directory, config)),
        num_shards=len(weight_files),
        num_bytes=sum(header.num_bytes for header in headers.values()),
        quantization_bits=bits,
        embedding_bits=embedding_bits,
        prefix_length=prefix_length,
    )


def read_config(directory: Path) -> ChatGLMConfig:
    """Return the configuration in directory; ValueError when it is another model's."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; give a model's directory, as downloaded."
        )
    values = read_json(file)
    model_type = values.get("model_type")
    if model_type != ChatGLMConfig.model_type:
        raise ValueError(
            f"{file} is for model_type {model_type!r}; this toolkit is for the first ChatGLM-6B, "
            f"whose model_type is {ChatGLMConfig.model_type!r}."
        )
    config: ChatGLMConfig = ChatGLMConfig.from_dict(values)
    return config


def _num_image_tokens(directory: Path, config: ChatGLMConfig) -> int:
    file = directory / TOKENIZER_CONFIG_FILE
    given = read_json(file).get("num_image_tokens") if file.is_file() else None
    if isinstance(given, int):
        return given
    return OLDER_NUM_IMAGE_TOKENS if config.vocab_size == OLDER_VOCABULARY else 0


def _packed_bits(header: TensorHeader | None, columns: int) -> int:
    """Return 8 or 4 for an int8 tensor with that many columns, 0 for floats or no tensor."""
    if header is None or header.dtype != torch.int8 or len(header.shape) != 2:
        return 0
    return 4 if header.shape[1] * 2 == columns else 8


def _stored_bits(
    directory: Path, headers: dict[str, TensorHeader], config: ChatGLMConfig
) -> tuple[int, int]:
    """Return the bits of the layers' weights and of the embedding, 0 for floats.

    ValueError where the configuration says otherwise.
    """
    name = f"transformer.layers.0.{LAYER_LINEARS[0]}.weight"
    bits = _packed_bits(headers.get(name), config.hidden_size)
    embedding_bits = _packed_bits(headers.get(EMBEDDING), config.hidden_size)
    given = config.quantization_bit
    if given:
        check_bits(given)
    if given and bits not in (0, given):
        raise ValueError(
            f"quantization_bit is {given}, but the weights in {directory} are stored with {bits} "
            "bits; leave it out, or give the float16 release."
        )
    if (config.embedding_quantization_bit or 0) not in (0, embedding_bits):
        stored = f"{embedding_bits} bits" if embedding_bits else "floats"
        raise ValueError(
            f"embedding_quantization_bit is {config.embedding_quantization_bit}, but {EMBEDDING} "
            f"is stored as {stored}; leave it out of config.json; the embedding can be quantised "
            "after loading."
        )
    return bits, embedding_bits


def _expected_shapes(
    headers: dict[str, TensorHeader], config: ChatGLMConfig, bits: int
) -> dict[str, Shape]:
    expected: dict[str, Shape] = {}
    for name, (rows, *columns) in float_shapes(config).items():
        if name == HEAD and config.tie_word_embeddings and HEAD not in headers:
            continue
        tensor_bits = bits if is_layer_linear(name) else 0
        if name in (EMBEDDING, HEAD):
            tensor_bits = _packed_bits(headers.get(name), config.hidden_size)
        if tensor_bits:
            expected[name] = (rows, packed_columns(columns[0], tensor_bits))
            expected[name + SCALE_SUFFIX] = (rows,)
        else:
            expected[name] = (rows, *columns)
    return expected


def _add_prefix(
    expected: dict[str, Shape], headers: dict[str, TensorHeader], config: ChatGLMConfig
) -> int | None:
    """Expect the prefix that is among the tensors, if any, and return its length."""
    table = headers.get(f"{PREFIX_KEYS}embedding.weight")
    if table is None or not table.shape:
        return None
    project = f"{PREFIX_KEYS}trans.0.weight" in headers
    length = table.shape[0]
    for name, given, found in (
        ("pre_seq_len", config.pre_seq_len, length),
        ("prefix_projection", config.prefix_projection, project),
    ):
        if config.pre_seq_len is not None and given != found:
            raise ValueError(
                f"{name} is {given}, but the prefix in {table.file.name} has {found}; leave "
                f"pre_seq_len out and load the prefix by itself from {table.file.parent}."
            )
    expected.update(prefix_shapes(config, length, project))
    return length


def _check_tensors(
    directory: Path, headers: dict[str, TensorHeader], expected: dict[str, Shape]
) -> None:
    missing = [name for name in expected if name not in headers]
    if missing and all(name.startswith(PREFIX_KEYS) for name in headers):
        raise ValueError(
            f"{directory} holds a prefix and no model; give the model it was trained on instead."
        )
    if missing:
        raise ValueError(
            f"{directory} lacks {shorten(missing)} of the {len(expected)} tensors its "
            "config.json calls for; copy or download the weights again, or the config.json that "
            "belongs to them."
        )
    packed = [name + SCALE_SUFFIX in expected for name in (EMBEDDING, HEAD) if name in expected]
    if len(set(packed)) > 1:
        raise ValueError(
            f"{directory} holds one of {EMBEDDING} and {HEAD} as int8 and the other as floats; "
            "both or neither are quantised: download the weights again from one place."
        )
    for name, shape in expected.items():
        header = headers[name]
        if header.shape != shape:
            raise ValueError(
                f"{header.file}: {name} has shape {list(header.shape)}, but config.json calls for "
                f"{list(shape)}; the two belong to different models: download both from one place."
            )
        if is_layer_linear(name) and (header.dtype == torch.int8) != (
            name + SCALE_SUFFIX in expected
        ):
            raise ValueError(
                f"{header.file}: {name} is {str(header.dtype)[6:]}, unlike the other layers' "
                "weights; copy or download the weights again."
            )


def is_layer_linear(name: str) -> bool:
    """Return whether name is a weight that quantisation touches.

    >>> is_layer_linear("transformer.layers.3.mlp.dense_h_to_4h.weight")
    True
    >>> is_layer_linear("lm_head.weight")
    False
    """
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def linear_shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Return the (rows, columns) of each linear weight of a layer."""
    shapes = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
    return dict(zip(LAYER_LINEARS, shapes, strict=True))


def float_shapes(config: ChatGLMConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a float checkpoint without a prefix, in file order."""
    hidden, width = config.hidden_size, config.inner_hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"transformer.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = shapes[f"{layer}{norm}.bias"] = (hidden,)
        for linear, (rows, columns) in linear_shapes(hidden, width).items():
            shapes[f"{layer}{linear}.weight"] = (rows, columns)
            shapes[f"{layer}{linear}.bias"] = (rows,)
    for part in ("weight", "bias"):
        shapes[f"transformer.final_layernorm.{part}"] = (hidden,)
    shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def prefix_shapes(config: ChatGLMConfig, prefix_length: int, project: bool) -> dict[str, Shape]:
    """Return the shapes of a prefix of this length, under its full published names."""
    hidden = config.hidden_size
    table_width = 2 * config.num_layers * hidden
    if not project:
        return {f"{PREFIX_KEYS}embedding.weight": (prefix_length, table_width)}
    return {
        f"{PREFIX_KEYS}embedding.weight": (prefix_length, hidden),
        f"{PREFIX_KEYS}trans.0.weight": (hidden, hidden),
        f"{PREFIX_KEYS}trans.0.bias": (hidden,),
        f"{PREFIX_KEYS}trans.2.weight": (table_width, hidden),
        f"{PREFIX_KEYS}trans.2.bias": (table_width,),
    }


def release_name(config: ChatGLMConfig, num_image_tokens: int = 0) -> str:
    """Say in a few words which release a configuration belongs to.

    >>> release_name(ChatGLMConfig())
    'ChatGLM-6B with 130,528 tokens'
    """
    is_published_size = (config.num_layers, config.hidden_size) == (28, 4096)
    name = "ChatGLM-6B" if is_published_size else "a ChatGLM"
    size = f", {config.num_layers} layers, hidden size {config.hidden_size}"
    older = f" (the older release, whose ids are {num_image_tokens:,} higher)"
    return (
        f"{name} with {config.vocab_size:,} tokens{older if num_image_tokens else ''}"
        f"{'' if is_published_size else size}"
    )


def base_fingerprint(model: PreTrainedModel) -> str:
    """Return a short hash of the frozen base, the same in every dtype and at 8 and 4 bits.

    It covers the layer norms and biases, which no quantisation touches, rounded to bfloat16. The
    base must be stored in float16, as published: float32 values rounded to float16 first may differ
    by one bfloat16.
    """
    # LoRA wraps a linear, whose bias is then called base_layer.bias.
    named = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "prefix_encoder." not in name and "lora_" not in name
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(named.items()):
        if "layernorm" in name or name.endswith(".bias"):
            values = parameter.detach().to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(name.encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_base(
    model: PreTrainedModel,
    what: str,
    base_name: str | None,
    fingerprint: str | None,
    *,
    hint: str = "",
) -> None:
    """Refuse what was trained on a base of another fingerprint (ValueError); None is not known.

    what names the prefix or adapter in the message, hint a remedy besides loading its base.
    """
    if fingerprint is None:
        return
    found = base_fingerprint(model)
    if fingerprint != found:
        raise ValueError(
            f"{what} was trained on {base_name or 'a base'} (fingerprint {fingerprint[:8]}), but "
            f"{model.name_or_path or 'this base'} has {found[:8]}; load the base it was trained "
            f"on{hint}."
        )
