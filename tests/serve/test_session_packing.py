"""A session on a CPU serves from packed weights: nothing of its base is trained."""

import pytest
import torch

from ptuning.model.cpu.linear import Linear, has_onednn
from ptuning.serve.session import Session
from ptuning.tunings.loading import NANO_DIR


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch was built without oneDNN")
def test_every_linear_map_of_a_session_is_frozen_and_packed():
    with Session.load(NANO_DIR, device="cpu") as session:
        model = session.model
        assert not [name for name, p in model.named_parameters() if p.requires_grad]
        maps = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, Linear) and module.weight.dtype is torch.float32
        ]
        assert len(maps) >= 4 * model.config.num_layers  # attention has two, the MLP two
        assert not [name for name, module in maps if module.prepacked_weight() is None]
        assert session.chat("你好", max_new_tokens=4).read()
        assert not [name for name, module in maps if module.prepacked_weight() is None]
