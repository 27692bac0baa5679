"""One-layer outputs that chatglm.cpp publishes with its tests (tests/golden/chatglm_cpp, MIT).

Another group's port of the same model: eight heads, hidden size 32, three cached steps.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ptuning.model.chatglm import ChatGLMModel
from ptuning.model.config import ChatGLMConfig

HIDDEN, HEADS, PREFIX, VOCABULARY = 32, 8, 5, 5
HEAD_DIM = HIDDEN // HEADS
# In the order of the file: our name, then the shape.
WEIGHTS = {
    "word_embeddings.weight": (VOCABULARY, HIDDEN),
    "layers.0.input_layernorm.weight": (HIDDEN,),
    "layers.0.input_layernorm.bias": (HIDDEN,),
    "layers.0.attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
    "layers.0.attention.query_key_value.bias": (3 * HIDDEN,),
    "layers.0.attention.dense.weight": (HIDDEN, HIDDEN),
    "layers.0.attention.dense.bias": (HIDDEN,),
    "layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "layers.0.post_attention_layernorm.bias": (HIDDEN,),
    "layers.0.mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
    "layers.0.mlp.dense_h_to_4h.bias": (4 * HIDDEN,),
    "layers.0.mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
    "layers.0.mlp.dense_4h_to_h.bias": (HIDDEN,),
    "final_layernorm.weight": (HIDDEN,),
    "final_layernorm.bias": (HIDDEN,),
}


class Step(NamedTuple):
    tokens: Tensor  # (1, S)
    output: Tensor  # (S, HIDDEN)


class Reader:
    """Reads the file's row-major tensors one after the other."""

    def __init__(self, file: Path) -> None:
        self.content = file.read_bytes()
        self.offset = 0

    def take(self, shape: tuple[int, ...], kind: str) -> Tensor:
        values = np.frombuffer(self.content, kind, int(np.prod(shape)), self.offset)
        self.offset += values.nbytes
        return torch.from_numpy(values.reshape(shape).copy())


def read(file: Path, *, has_prefix: bool) -> tuple[ChatGLMModel, list[Tensor] | None, list[Step]]:
    """Return the model, its prefix as one tensor a layer, and the published steps."""
    reader = Reader(file)
    prefix = None
    if has_prefix:
        kv = reader.take((2, HEADS, PREFIX, HEAD_DIM), "<f2").float()
        prefix = [kv.unsqueeze(1)]  # (2, 1, H, P, D)
    config = ChatGLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_layers=1,
        num_attention_heads=HEADS,
        inner_hidden_size=4 * HIDDEN,
        gmask_token_id=1,  # the first step is a context of two and <sop>: 0 [gMASK] <sop>
        bos_token_id=2,
    )
    model = ChatGLMModel(config).eval()
    weights = {name: reader.take(shape, "<f4") for name, shape in WEIGHTS.items()}
    model.load_state_dict(weights)
    steps = []
    for length in (3, 1, 1):
        tokens = reader.take((1, length), "<i4").long()
        steps.append(Step(tokens, reader.take((length, HIDDEN), "<f4")))
    assert reader.offset == len(reader.content), "the file holds nothing else"
    return model, prefix, steps


@pytest.mark.parametrize(
    ("name", "has_prefix"), [("glm_model.data", False), ("glm_ptuning_v2_model.data", True)]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_outputs_of_three_cached_steps(
    golden: Path, name: str, has_prefix: bool, implementation: str
) -> None:
    model, prefix, steps = read(golden / "chatglm_cpp" / name, has_prefix=has_prefix)
    model.set_attn_implementation(implementation)
    cache = DynamicCache()
    for index, step in enumerate(steps):
        output = model(step.tokens, past_key_values=cache, use_cache=True, prefix_key_values=prefix)
        found = output.last_hidden_state[0]
        # chatglm.cpp holds its own float32 results against this file to 5e-2 in sum of one layer;
        # outputs are of size 1, and 1e-4 is what two float32 programs can be asked for.
        torch.testing.assert_close(found, step.output, atol=1e-4, rtol=0, msg=f"step {index}")


@torch.no_grad()
def test_the_prefix_matters_to_these_outputs(golden: Path) -> None:
    model, prefix, steps = read(
        golden / "chatglm_cpp" / "glm_ptuning_v2_model.data", has_prefix=True
    )
    assert prefix is not None
    without = model(steps[0].tokens).last_hidden_state[0]
    assert (without - steps[0].output).abs().max() > 1e-2
