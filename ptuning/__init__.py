"""P-Tuning v2 for ChatGLM-6B.

Importing this package registers the configuration, the model and the tokenizer with transformers' Auto classes and
does nothing else. `load_prefix` and `save_prefix` read and write trained prefixes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig

AutoConfig.register("chatglm", ChatGLMConfig)
# The published repository maps AutoModel to the class with the head; scripts written for it rely on that.
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
