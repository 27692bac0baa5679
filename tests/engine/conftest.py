"""The golden model with its golden prefix, one for each file of tests."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)


@pytest.fixture(scope="module")
def model(golden):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.add_prefix(8).load_state_dict(load_file(folder / "prefix.safetensors"))
    return model.eval()
