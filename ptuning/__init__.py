"""P-Tuning v2 for ChatGLM-6B.

Importing this package registers the configuration, the model and the tokenizer with transformers'
Auto classes and does nothing else. `load_prefix` and `save_prefix` read and write trained prefixes.
"""

from ptuning.versions import check_versions

check_versions()

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from ptuning.data.tokenizer import register_tokenizer  # noqa: E402
from ptuning.model.chatglm import ChatGLMForConditionalGeneration  # noqa: E402
from ptuning.model.config import ChatGLMConfig  # noqa: E402
from ptuning.model.prefix_artefact import load_prefix, save_prefix  # noqa: E402

__all__ = ["load_prefix", "save_prefix"]

AutoConfig.register("chatglm", ChatGLMConfig)
# The published repository maps AutoModel to the class with the head, and its scripts rely on that.
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
register_tokenizer()
