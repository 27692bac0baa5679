"""What a ChatGLM-6B checkpoint must hold: tensor names and shapes as published.

A quantised release stores the four linear weights of a layer as int8 (two columns in one byte at 4
bits) with one float16 scale per row beside them; the `-int4-qe` release does the same to the
embedding and the output head. Letters: V vocabulary, E hidden size, M width of the feed-forward.
Source of the names:
https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/pytorch_model.bin.index.json
"""

import re

from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.reference import packed_columns

EMBEDDING = "transformer.word_embeddings.weight"
HEAD = "lm_head.weight"
PREFIX_KEYS = "transformer.prefix_encoder."
SCALE_SUFFIX = "_scale"  # a quantised `x.weight` has its scales in `x.weight_scale`
LAYER_LINEARS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # stored by the published code, derived here
# A tied head shares the scale too; transformers must know, or it refuses to save the model.
TIED_SCALE = {HEAD + SCALE_SUFFIX: EMBEDDING + SCALE_SUFFIX}

Shape = tuple[int, ...]
_LINEAR_WEIGHT = re.compile(
    rf"transformer\.layers\.\d+\.(?:{'|'.join(map(re.escape, LAYER_LINEARS))})\.weight"
)

OLDER_VOCABULARY = 150528  # the older release: 20,000 image tokens come first
OLDER_NUM_IMAGE_TOKENS = 20_000


def is_layer_linear(name: str) -> bool:
    """Say whether name is a weight that quantisation touches.

    >>> is_layer_linear("transformer.layers.3.mlp.dense_h_to_4h.weight")
    True
    >>> is_layer_linear("lm_head.weight")
    False
    """
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def float_shapes(config: ChatGLMConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of a float checkpoint without a prefix, in file order."""
    hidden, width = config.hidden_size, config.inner_hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"transformer.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = shapes[f"{layer}{norm}.bias"] = (hidden,)
        for linear, (rows, columns) in zip(
            LAYER_LINEARS,
            ((3 * hidden, hidden), (hidden, hidden), (width, hidden), (hidden, width)),
            strict=True,
        ):
            shapes[f"{layer}{linear}.weight"] = (rows, columns)
            shapes[f"{layer}{linear}.bias"] = (rows,)
    for part in ("weight", "bias"):
        shapes[f"transformer.final_layernorm.{part}"] = (hidden,)
    shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def packed_shape(shape: Shape, bits: int) -> Shape:
    """Return the stored shape of a (rows, columns) weight at 8 or 4 bits.

    >>> packed_shape((96, 32), 4)
    (96, 16)
    """
    return (shape[0], packed_columns(shape[1], bits))


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
