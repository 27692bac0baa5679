"""The base of a run is frozen, however it is loaded."""

import pytest
import torch

from ptuning.model.quantization.linear import QuantizedLinear
from ptuning.nano.paths import NANO_DIR
from ptuning.train.base_model import load_base

LOADS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantization_bit": 8},
    "int4, embedding int8": {
        "dtype": torch.float32,
        "quantization_bit": 4,
        "quantize_embeddings": True,
    },
}


@pytest.mark.parametrize("how", LOADS.values(), ids=LOADS)
def test_no_parameter_of_a_loaded_base_is_trained(how):
    model = load_base(str(NANO_DIR), **how)
    assert model.transformer.final_layernorm.weight.dtype is how["dtype"]
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert is_quantized is ("quantization_bit" in how)


def test_a_prefix_added_to_a_loaded_base_is_all_that_is_trained():
    model = load_base(str(NANO_DIR), dtype=torch.float32)
    model.add_prefix(4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["transformer.prefix_encoder.embedding.weight"]
