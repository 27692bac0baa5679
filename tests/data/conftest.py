"""A small vocabulary trained for this session, and the real one where it is at hand."""

from pathlib import Path

import pytest

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.nano.build import train_vocabulary

SENTENCES = [
    "这件白色的衬衫很轻，适合夏天穿，颜色也很好看。",
    "类型#裙*颜色#蓝色*风格#简约*图案#条纹",
    "你好，今天的天气怎么样？我想出去走走。",
    "裤子的版型宽松，面料舒服，走路很方便。",
    "Hello world, this is a small test of the vocabulary.",
    "The quick answer is 42, not 1234567890.",
    "def add(a, b):\n    return a + b\n\tprint(add(1, 2))",
    "[Round 0]\n问：你好\n答：你好，有什么可以帮你？\n[Round 1]\n问：谢谢\n答：",
    "她买了两件外套：一件红色，一件黑色；都很保暖！",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ <>[]/_|",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ice_text.model and tokenizer_config.json, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(SENTENCES * 4, folder / "ice_text.model", vocab_size=600)
    ChatGLMTokenizer(folder / "ice_text.model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def real_tokenizer(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data" / "chatglm-6b")
