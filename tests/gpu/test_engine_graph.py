"""Decoding with CUDA graphs gives the tokens of plain steps, on a card."""

import pytest
import torch

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.engine import Engine
from ptuning.model.engine_row import Request
from ptuning.model.quantization.conversion import quantize_model_
from ptuning.model.shared_prefix import SharedPrefix, mix_prefixes

pytestmark = pytest.mark.gpu
NEVER: frozenset[int] = frozenset({1})


@pytest.fixture
def device() -> torch.device:
    """The first card."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


def build(device: torch.device, bits: int) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=1024,
        hidden_size=512,
        num_layers=4,
        num_attention_heads=4,
        inner_hidden_size=2048,
        bos_token_id=1020,
        eos_token_id=1021,
        mask_token_id=1022,
        gmask_token_id=1023,
        tie_word_embeddings=True,
    )
    model = ChatGLMForConditionalGeneration(config).half().to(device).eval()
    if bits:
        quantize_model_(model, bits)
    model.add_prefix(16)
    return model


def answers(model: ChatGLMForConditionalGeneration, max_rows: int, record_steps: bool) -> list:
    engine = Engine(model, max_rows=max_rows, record_steps=record_steps)
    with torch.no_grad():
        prefix = SharedPrefix(model.transformer.prefix_for(True) or ())
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(11):
        prompt = torch.randint(10, 900, (4 + 5 * index % 40,), generator=generator).tolist()
        shares = mix_prefixes([(prefix, 1.0)] if index % 3 else [])
        rows.append(
            engine.add(Request([*prompt, 1023, 1020], 20 + 9 * index % 50, shares, end_ids=NEVER))
        )
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, engine.graphed.num_graphs if engine.graphed else 0)
    if engine.graphed:
        assert engine.graphed.why_not == ""
        assert most > 0, "steps were recorded"
    return [row.answer for row in rows]


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("max_rows", [1, 4, 11])
def test_tokens_are_those_of_plain_steps(device: torch.device, bits: int, max_rows: int) -> None:
    model = build(device, bits)
    found, plain = (answers(model, max_rows, record_steps) for record_steps in (True, False))
    # Filling a batch up may change the order of a sum, and a tie of random weights with it.
    same = sum(a == b for a, b in zip(found, plain, strict=True))
    assert same >= len(plain) - 1
