"""Compiled layers give the numbers of plain ones, and a compiler that fails is told, not hidden."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.nn.attention import sdpa_kernel
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401
from ptuning.model.attention import CUDA_ATTENTION
from ptuning.model.quantization.layers import quantize_model_
from ptuning.train.fit import TOKENS_TO_AMORTISE, compile_layers, compiling_pays
from ptuning.train.processes import trainer_arguments
from ptuning.train.run_config import parse_arguments
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


def attention_as_on_cuda(query, key, value, mask):
    with sdpa_kernel(CUDA_ATTENTION):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def step(model):
    config = model.config
    ids = torch.tensor([[20, 21, 22, config.gmask_token_id, config.bos_token_id, 30, 31, 32]])
    labels = torch.where(torch.arange(8) > 4, ids, -100)
    model.zero_grad()
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    return loss.detach(), model.prefix_encoder.embedding.weight.grad.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "grid"])
def test_compiled_equals_eager(model, monkeypatch, by_rows, dropout):
    monkeypatch.setattr("ptuning.model.chatglm.ChatGLMModel.uses_varlen", lambda _: by_rows)
    model.prefix_encoder.dropout = dropout
    torch.manual_seed(1)
    loss, gradient = step(model)
    assert compile_layers(model, CPU, backend="aot_eager")
    torch.manual_seed(1)
    compiled_loss, compiled_gradient = step(model)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradient, gradient)
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [0, 4])
def test_a_layer_kind_is_one_graph_for_all_lengths(tmp_path, monkeypatch, bits):
    """The first layer's input needs no gradient, the last continues with answers: three kinds."""
    monkeypatch.setattr("ptuning.model.chatglm.ChatGLMModel.uses_varlen", lambda _: False)
    monkeypatch.setattr("ptuning.model.attention.fused_attention", attention_as_on_cuda)
    make_base(tmp_path, num_layers=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if bits:
        quantize_model_(model, bits)
    model.add_prefix(4)
    model.freeze_base()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    assert compile_layers(model.train(), CPU, backend=count)
    graphs.clear()  # the one line that is tried first
    for length in (40, 52, 47, 61):
        ids = torch.full((3, length), 20)
        ids[:, 20], ids[:, 21] = model.config.gmask_token_id, model.config.bos_token_id
        labels = torch.where(torch.arange(length) > 21, ids, -100)
        mask = torch.ones_like(ids)
        mask[1, -9:], labels[1, -9:] = 0, -100
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert len(graphs) == 3
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_long_runs_on_cuda_in_bfloat16_are_compiled_unasked():
    cuda = torch.device("cuda")
    assert compiling_pays(cuda, torch.bfloat16, TOKENS_TO_AMORTISE)
    assert not compiling_pays(cuda, torch.bfloat16, TOKENS_TO_AMORTISE - 1)
    assert not compiling_pays(cuda, torch.float16, TOKENS_TO_AMORTISE)
    assert not compiling_pays(CPU, torch.bfloat16, TOKENS_TO_AMORTISE)


def test_a_run_that_is_not_to_be_compiled_is_not(model):
    assert not compile_layers(model, CPU, num_tokens=1e9)
    assert not compile_layers(model, CPU, wanted=False, num_tokens=1e9)


def test_on_a_cpu_it_is_left_out_aloud(model, caplog):
    caplog.set_level(logging.INFO)
    assert not compile_layers(model, CPU, wanted=True)
    assert "on a CPU compiled layers are slower" in caplog.text


def test_a_compiler_that_fails_is_named_and_the_layers_run_as_they_are(model, caplog):
    def broken(*_):
        raise RuntimeError("no C compiler here\nand more lines")

    before = step(model)
    assert not compile_layers(model, CPU, backend=broken)
    assert "run uncompiled" in caplog.text
    assert "no C compiler here" in caplog.text
    torch.testing.assert_close(step(model), before)
    torch._dynamo.reset()


def test_transformers_is_told_nothing_of_compiling(tmp_path):
    flags = ["--do_train", "--model_name_or_path", "my/base", "--train_file", "t.json"]
    flags += ["--pre_seq_len", "4", "--output_dir", str(tmp_path)]
    config = parse_arguments([*flags, "--torch_compile", "--torch_compile_mode", "default"])
    assert config.torch_compile
    assert not trainer_arguments(config).torch_compile, "it would compile the whole model"
