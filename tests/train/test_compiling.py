"""Compiled layers give the numbers of plain ones, and a compiler that fails is told, not hidden."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401
from ptuning.train.compiling import Compiling, compile_layers
from ptuning.train.flags import parse_arguments
from tests.tiny import make_base

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    make_base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.add_prefix(4)
    model.freeze_base()
    model.prefix_encoder.dropout = 0.0
    return model.train()


def step(model):
    config = model.config
    ids = torch.tensor([[20, 21, 22, config.gmask_token_id, config.bos_token_id, 30, 31, 32]])
    labels = torch.where(torch.arange(8) > 4, ids, -100)
    model.zero_grad()
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    return loss.detach(), model.prefix_encoder.embedding.weight.grad.clone()


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "grid"])
def test_compiled_equals_eager(model, monkeypatch, by_rows):
    monkeypatch.setattr("ptuning.model.backbone.ChatGLMModel.attends_by_rows", lambda _: by_rows)
    loss, gradient = step(model)
    assert compile_layers(model, Compiling(True, "aot_eager", None), CPU)
    compiled_loss, compiled_gradient = step(model)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradient, gradient)
    torch._dynamo.reset()


def test_on_a_cpu_it_is_left_out_aloud(model, caplog):
    caplog.set_level(logging.INFO)
    assert not compile_layers(model, Compiling(True, None, None), CPU)
    assert "slower than a plain one" in caplog.text


def test_a_compiler_that_fails_is_named_and_the_layers_run_as_they_are(model, caplog):
    def broken(*_):
        raise RuntimeError("no C compiler here\nand more lines")

    before = step(model)
    assert not compile_layers(model, Compiling(True, broken, None), CPU)
    assert "run uncompiled" in caplog.text
    assert "no C compiler here" in caplog.text
    torch.testing.assert_close(step(model), before)
    torch._dynamo.reset()


def test_the_flags_are_taken_from_transformers(tmp_path):
    flags = [
        "--do_train",
        "--model_name_or_path",
        "x",
        "--train_file",
        "t.json",
        "--pre_seq_len",
        "4",
    ]
    training = parse_arguments([*flags, "--output_dir", str(tmp_path), "--torch_compile"]).training
    assert training.compiling == Compiling(True, None, None)
    assert not training.torch_compile, "transformers would compile the whole model"
