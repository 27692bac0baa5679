"""ChatGLM-6B's configuration: the published `config.json` (`model_type: chatglm`), key by key.

Model sizes come from it and from nowhere else.
Source: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/config.json
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

# Keys that only the later generations (ChatGLM2, ChatGLM3, GLM-4) write under the same model_type.
LATER_GENERATION_KEYS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size", "rmsnorm")
POSITIVE_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "max_sequence_length",
)
SOP_TOKEN_ID = 130004  # of the newer release; the older one's ids are all 20,000 higher


class ChatGLMConfig(PreTrainedConfig):
    """Sizes and token ids of a first-generation ChatGLM; later generations are refused.

    `pre_seq_len` (prefix length in tokens, None for no prefix) and `prefix_projection` are
    published keys too.
    """

    model_type: ClassVar[str] = "chatglm"
    tokenizer_class: ClassVar[str] = "ChatGLMTokenizer"  # for folders without its config
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    auto_map: ClassVar[dict[str, str]] = {}  # trl reads it, and a config.json may lack it

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    use_cache: bool = True
    initializer_range: float = 0.02
    bos_token_id: int = SOP_TOKEN_ID
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    # None, as the published config.json has no such key: tied if the checkpoint's tables are equal.
    tie_word_embeddings: bool | None = None
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0
    embedding_quantization_bit: int = 0  # our own key; the published -int4-qe config has none

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse other models and impossible sizes."""
        later = [key for key in LATER_GENERATION_KEYS if key in kwargs]
        if later:
            raise ValueError(
                f"this config.json has {', '.join(later)}: it belongs to ChatGLM2, ChatGLM3 or "
                "GLM-4, which share model_type 'chatglm' but are other models; this toolkit is for "
                "the first ChatGLM-6B (THUDM/chatglm-6b)."
            )
        if not self.position_encoding_2d:
            raise ValueError(
                "position_encoding_2d is false; ChatGLM-6B has two-dimensional positions, so set "
                "it to true."
            )
        super().__post_init__(**kwargs)
        for name in POSITIVE_SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size} with {self.num_attention_heads} heads; "
                "two-dimensional rotary needs a head width divisible by 4."
            )
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len is {self.pre_seq_len}; use 1 or more, or leave it out.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config.json; ids missing in the older release's follow from <sop>'s."""
        bos_token_id = config_dict.get("bos_token_id")
        if isinstance(bos_token_id, int):
            ids = {"mask_token_id": bos_token_id - 4, "gmask_token_id": bos_token_id - 3}
            if bos_token_id >= SOP_TOKEN_ID:
                ids["pad_token_id"] = bos_token_id - SOP_TOKEN_ID + 3
            config_dict = ids | config_dict
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_attention_heads
