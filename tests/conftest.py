"""What every test may use: golden numbers, shared real data, the golden model, a random small one."""

import copy
import gc
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizer

import ptuning
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from tests.completions.scripted import ScriptedServer

TESTS = Path(__file__).resolve().parent
NANO = Path(ptuning.__file__).parent / "nano" / "weights"
PAD, MASK, GMASK, SOP, EOP = 3, 60, 61, 62, 63  # of the small model
TRANSFORMERS_MARKS = (
    "accelerate_tests generate is_training_test run_first torch_compile_test torch_export_test "
    "flash_attn_test flash_attn_3_test flash_attn_4_test all_flash_attn_test"
)


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks of transformers' own tests, which test_transformers_suite.py brings in.

    setuptools is imported first: it replaces distutils, and fails where that was imported before.
    """
    with suppress(ImportError):
        importlib.import_module("setuptools")
    for mark in TRANSFORMERS_MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what was imported so far out of every later garbage collection; each run ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: on tensors this small, more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers made by the published code; always there."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the checkout; the test skips where it is absent."""
    folder = TESTS.parents[1] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real tokenizer and ADGEN rows), which is not here")
    return folder


@pytest.fixture(scope="session")
def tensors(golden: Path) -> dict[str, Tensor]:
    """The inputs and outputs of the published code on chatglm-tiny."""
    return load_file(golden / "chatglm-tiny" / "cases.safetensors")


@pytest.fixture(scope="session")
def cases(golden: Path) -> dict[str, Any]:
    """What the published code generated, and how its training run went."""
    text = (golden / "chatglm-tiny" / "cases.json").read_text(encoding="utf-8")
    return json.loads(text)["cases"]


@pytest.fixture(scope="session")
def loaded_tiny(golden: Path) -> ChatGLMForConditionalGeneration:
    """chatglm-tiny as loaded; tests take `tiny`, a copy of their own."""
    return AutoModelForCausalLM.from_pretrained(golden / "chatglm-tiny", dtype=torch.float32)


@pytest.fixture
def tiny(loaded_tiny: ChatGLMForConditionalGeneration) -> ChatGLMForConditionalGeneration:
    """chatglm-tiny in float32, without a prefix."""
    return copy.deepcopy(loaded_tiny).eval()


@pytest.fixture
def tiny_with_prefix(
    tiny: ChatGLMForConditionalGeneration, golden: Path
) -> ChatGLMForConditionalGeneration:
    """chatglm-tiny with its golden prefix."""
    ptuning.load_prefix(tiny, golden / "chatglm-tiny" / "prefix.safetensors")
    return tiny


@pytest.fixture(scope="session")
def loaded_nano() -> tuple[ChatGLMForConditionalGeneration, PreTrainedTokenizer]:
    """The shipped model in float32 and its tokenizer; tests leave both as they are."""
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """An endpoint that answers by a script, reached without any proxy; a test may reprogram it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def build_small() -> Callable[..., ChatGLMForConditionalGeneration]:
    """A function that builds a random three-layer model; the same seed gives the same weights."""

    def build(*, seed: int = 0, **changes: Any) -> ChatGLMForConditionalGeneration:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "inner_hidden_size": 64,
            "pad_token_id": PAD,
            "mask_token_id": MASK,
            "gmask_token_id": GMASK,
            "bos_token_id": SOP,
            "eos_token_id": EOP,
            "initializer_range": 0.3,  # large enough for every prompt to get its own answer
        }
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes | changes)).eval()

    return build


@pytest.fixture
def small(
    build_small: Callable[..., ChatGLMForConditionalGeneration],
) -> ChatGLMForConditionalGeneration:
    """The random model with a random prefix of 5."""
    model = build_small()
    model.add_prefix(5)
    return model


@pytest.fixture
def prompts() -> list[list[int]]:
    """Four prompts of different lengths for the small model."""
    return [
        [5, 6, 7, 8, 9, 10, GMASK, SOP],
        [11, GMASK, SOP],
        [12, 13, 14, 15, MASK, 16, 17, 18, 19, GMASK, SOP],
        [20, 21, 22, 23, GMASK, SOP],
    ]


@pytest.fixture
def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """The prompts as one batch, as the tokenizer makes it."""
    width = max(len(prompt) for prompt in prompts)
    rows = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


@pytest.fixture
def training_batch() -> dict[str, Tensor]:
    """Four right-padded rows with labels from <sop> on."""
    rows = [
        [5, 6, 7, GMASK, SOP, 30, 31, 32, EOP],
        [8, GMASK, SOP, 33, EOP],
        [9, 10, 11, 12, GMASK, SOP, 34, 35, 36, 37, EOP],
        [13, 14, GMASK, SOP, 38, 39, 40, EOP],
    ]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    labels = torch.full_like(input_ids, -100)
    for index, row in enumerate(rows):
        answer = row.index(SOP)
        labels[index, answer : len(row)] = torch.tensor(row[answer:])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "labels": labels,
    }
