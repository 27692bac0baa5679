import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import ptuning
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint import files as checkpoint_files
from ptuning.model.checkpoint.layout import float_shapes, prefix_shapes, read_checkpoint
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.layers import quantize_embeddings_
from tests.model.published import (
    SHIFT,
    golden_config,
    golden_tensors,
    make_older,
    make_published,
    make_safetensors,
    published_order,
    write_companions,
    write_shards,
)


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "chatglm-tiny" / "cases.safetensors")


@pytest.fixture(scope="module")
def published(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_published(golden, tmp_path_factory.mktemp("base") / "chatglm-6b", tied=False)


def is_tied(model: ChatGLMForConditionalGeneration) -> bool:
    return model.lm_head.weight is model.transformer.word_embeddings.weight


def test_layout_is_the_models_own_state_dict(golden: Path) -> None:
    config = ChatGLMConfig(**golden_config(golden))
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == float_shapes(config)
        model.attach_prefix(model.transformer.new_prefix_encoder(5, project=True).to("meta"))
    found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert found == float_shapes(config) | prefix_shapes(config, 5, True)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_eight_shards_load_through_the_auto_classes(
    published: Path,
    cases: dict[str, torch.Tensor],
    auto_class: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: (seen.append(k["weights_only"]), load(*a, **k))[1]
    )
    model = auto_class.from_pretrained(published, dtype=torch.float32)
    assert isinstance(model, ChatGLMForConditionalGeneration)
    assert not model.training
    assert model.name_or_path == model.config.name_or_path == str(published)
    assert seen, "the shards went through torch.load"
    assert all(seen), "every shard was read with weights_only"
    with torch.no_grad():
        logits = model(input_ids=cases["forward_prefix.input_ids"]).logits
    torch.testing.assert_close(logits, cases["forward_plain.logits"], rtol=0, atol=1e-4)


def test_remote_code_is_not_run_even_when_asked_for(published: Path) -> None:
    model = AutoModel.from_pretrained(
        published, trust_remote_code=True
    )  # modeling_chatglm.py would exit
    assert type(model) is ChatGLMForConditionalGeneration


def test_shards_and_safetensors_hold_the_same_model(
    golden: Path, published: Path, tmp_path: Path
) -> None:
    first = AutoModel.from_pretrained(published)
    second = AutoModel.from_pretrained(make_safetensors(golden, tmp_path / "st"))
    assert first.dtype == second.dtype == torch.float16, "the dtype of config.json is the default"
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_safetensors_are_preferred_and_the_kind_can_be_chosen(golden: Path, tmp_path: Path) -> None:
    directory = make_safetensors(golden, make_published(golden, tmp_path / "both", tied=True))
    assert not is_tied(AutoModel.from_pretrained(directory)), "model.safetensors is not tied"
    assert is_tied(AutoModel.from_pretrained(directory, use_safetensors=False)), "the shards are"


def test_published_directory_trains_its_prefix_and_nothing_else(
    published: Path, cases: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32, pre_seq_len=4)
    model.freeze_base()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(
        input_ids=cases["forward_prefix.input_ids"], labels=cases["forward_prefix.labels"]
    ).loss.backward()
    optimizer.step()
    changed = [
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    ]
    assert changed == ["transformer.prefix_encoder.embedding.weight"]


def test_equal_head_is_tied_and_gives_the_same_logits_as_two_copies(
    golden: Path, tmp_path: Path
) -> None:
    directory = make_published(golden, tmp_path / "tied", tied=True)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    assert is_tied(model)
    assert model.config.tie_word_embeddings
    ids = torch.tensor([[5, 6, 7, 1001, 1004]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        torch.testing.assert_close(model(input_ids=ids).logits, logits)


def test_other_head_is_left_alone(golden: Path, published: Path) -> None:
    model = AutoModel.from_pretrained(published)
    assert not is_tied(model)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, golden_tensors(golden)["lm_head.weight"])


def test_other_head_is_left_alone_even_where_the_config_says_tied(
    golden: Path, tmp_path: Path
) -> None:
    directory = make_safetensors(golden, tmp_path / "base", tie_word_embeddings=True)
    model = AutoModel.from_pretrained(directory)
    assert torch.equal(model.lm_head.weight, golden_tensors(golden)["lm_head.weight"])


def test_saved_tied_model_has_one_copy_and_loads_again(golden: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(make_published(golden, tmp_path / "tied", tied=True))
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert is_tied(again)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_one_asked_for_and_the_prefix_stays_float32(
    golden: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = published_order(golden_tensors(golden))
    prefix = load_file(golden / "chatglm-tiny" / "prefix.safetensors")["embedding.weight"]
    tensors["transformer.prefix_encoder.embedding.weight"] = prefix
    write_companions(tmp_path / "base", golden_config(golden, pre_seq_len=8))
    write_shards(tmp_path / "base", tensors)
    model = AutoModel.from_pretrained(tmp_path / "base", dtype=dtype)
    kinds = {name.startswith("transformer.prefix"): p.dtype for name, p in model.named_parameters()}
    assert kinds == {False: dtype, True: torch.float32}
    assert torch.equal(model.prefix_encoder.embedding.weight, prefix.float())


def test_config_keys_given_to_the_class_itself_reach_the_config(published: Path) -> None:
    model = ChatGLMForConditionalGeneration.from_pretrained(
        published, pre_seq_len=3, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.config.pre_seq_len == model.prefix_encoder.prefix_length == 3
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_generation_config_beside_the_weights_is_read(golden: Path, tmp_path: Path) -> None:
    directory = make_safetensors(golden, tmp_path / "base")
    (directory / "generation_config.json").write_text(
        '{"top_k": 7, "do_sample": true}', encoding="utf-8"
    )
    assert AutoModel.from_pretrained(directory).generation_config.top_k == 7


def test_loading_info_can_be_asked_for(published: Path) -> None:
    _, info = AutoModel.from_pretrained(published, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_older_release_is_recognised_and_means_the_same(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_older(golden, tmp_path / "older")
    with caplog.at_level(logging.INFO, logger="ptuning"):
        older = AutoModel.from_pretrained(directory, dtype=torch.float32)
    lines = [
        record.getMessage() for record in caplog.records if str(directory) in record.getMessage()
    ]
    assert len(lines) == 1
    assert "21,024 tokens (the older release, whose ids are 20,000 higher)" in lines[0]
    assert (older.config.mask_token_id, older.config.gmask_token_id) == (1000 + SHIFT, 1001 + SHIFT)
    newer = AutoModel.from_pretrained(
        make_safetensors(golden, tmp_path / "newer"), dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7, 1001, 1004, 9, 10]])
    with torch.no_grad():
        expected, found = newer(input_ids=ids).logits, older(input_ids=ids + SHIFT).logits
    torch.testing.assert_close(found[..., SHIFT:], expected)


def test_ids_that_the_published_older_config_leaves_out_follow_from_sop() -> None:
    config = ChatGLMConfig.from_dict(
        {"vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005}
    )
    assert (config.mask_token_id, config.gmask_token_id, config.pad_token_id) == (
        150000,
        150001,
        20003,
    )


def test_summary_says_what_lies_there_without_reading_weights(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_published(golden, tmp_path / "base")
    monkeypatch.setattr(
        checkpoint_files.CheckpointReader, "read", None
    )  # a weight that is read ends the test
    summary = read_checkpoint(directory)
    assert (summary.num_shards, summary.dtype, summary.quantization_bits) == (8, torch.float16, 0)
    stored = published_order(golden_tensors(golden)).values()
    assert summary.num_bytes == sum(value.nbytes for value in stored)
    assert str(summary) == (
        "a ChatGLM with 1,024 tokens, 28 layers, hidden size 32; float16 weights, "
        f"{summary.num_bytes / 1e6:.1f} MB in 8 files"
    )


def with_prefix(golden: Path, directory: Path, **changes: int) -> Path:
    tensors = published_order(golden_tensors(golden))
    for name, value in load_file(golden / "chatglm-tiny" / "prefix.safetensors").items():
        tensors[f"transformer.prefix_encoder.{name}"] = value
    write_companions(directory, golden_config(golden, **changes))
    write_shards(directory, tensors)
    return directory


def test_prefix_in_a_full_checkpoint_is_not_lost_silently(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cases: dict[str, torch.Tensor]
) -> None:
    directory = with_prefix(golden, tmp_path / "old-style")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    assert model.prefix_encoder is None
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "prefix of 8 tokens" in warnings[0]
    assert f"load_prefix(model, {str(directory)!r})" in warnings[0]


def test_prefix_in_a_full_checkpoint_loads_with_pre_seq_len(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cases: dict[str, torch.Tensor]
) -> None:
    model = AutoModel.from_pretrained(
        with_prefix(golden, tmp_path / "a", pre_seq_len=8), dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(input_ids=cases["forward_prefix.input_ids"]).logits
    torch.testing.assert_close(logits, cases["forward_prefix.logits"], rtol=0, atol=1e-4)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"pre_seq_len is 9, but the prefix in .* has 8"):
        AutoModel.from_pretrained(with_prefix(golden, tmp_path / "b", pre_seq_len=9))


def test_old_style_checkpoint_serves_as_base_and_as_prefix(golden: Path, tmp_path: Path) -> None:
    whole = tmp_path / "checkpoint-3000"
    write_companions(whole, golden_config(golden))
    tensors = golden_tensors(golden)
    prefix = load_file(golden / "chatglm-tiny" / "prefix.safetensors")["embedding.weight"]
    tensors["transformer.prefix_encoder.embedding.weight"] = prefix
    write_shards(whole, tensors, num_shards=1)
    model = AutoModel.from_pretrained(whole)
    assert ptuning.load_prefix(model, whole).prefix_length == 8
    assert torch.equal(model.prefix_encoder.embedding.weight, prefix.float())


LATER = {
    "multi_query_attention": True,
    "padded_vocab_size": 65024,
    "ffn_hidden_size": 13696,
    "rmsnorm": True,
}


@pytest.mark.parametrize(
    "load", [AutoModel, AutoModelForCausalLM, AutoConfig, ChatGLMForConditionalGeneration]
)
def test_later_generation_is_refused_with_one_line(
    golden: Path, tmp_path: Path, load: type
) -> None:
    config = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096} | LATER
    write_companions(tmp_path, config)
    torch.save(
        {"transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": torch.ones(2, 2)},
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(ValueError, match=r"ChatGLM2, ChatGLM3 or GLM-4.*THUDM/chatglm-6b") as error:
        load.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is for model_type 'llama'"):
        read_checkpoint(tmp_path)


def test_variants_are_refused(published: Path) -> None:
    with pytest.raises(ValueError, match="variant is given"):
        AutoModel.from_pretrained(published, variant="fp16")


PARTS = dict.fromkeys(
    (
        "transformer.word_embeddings",
        "transformer.layers",
        "transformer.final_layernorm",
        "lm_head",
    ),
    "cpu",
)


@pytest.mark.parametrize("packed", [False, True])
def test_a_tied_embedding_may_be_offloaded_to_disk(
    golden: Path, tmp_path: Path, packed: bool
) -> None:
    model = AutoModel.from_pretrained(make_published(golden, tmp_path / "tied"))
    if packed:
        quantize_embeddings_(model)
    model.save_pretrained(tmp_path / "again")
    ids = torch.tensor([[5, 6, 7, 1001, 1004]])
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "again", dtype=torch.float32)(ids).logits
        offloaded = AutoModel.from_pretrained(
            tmp_path / "again",
            dtype=torch.float32,
            device_map={**PARTS, "transformer.word_embeddings": "disk", "lm_head": "disk"},
            offload_folder=tmp_path / "disk",
        )
        assert offloaded.lm_head.weight.is_meta
        torch.testing.assert_close(offloaded(ids).logits, expected)


@pytest.mark.parametrize("on_disk", ["transformer.word_embeddings", "lm_head"])
def test_a_tied_embedding_half_on_disk_is_refused(
    golden: Path, tmp_path: Path, on_disk: str
) -> None:
    directory = make_published(golden, tmp_path / "tied")
    parts = {**PARTS, on_disk: "disk"}
    options = {"device_map": parts, "offload_folder": tmp_path / "disk"}
    with pytest.raises(ValueError, match="are one tensor; put both"):
        AutoModel.from_pretrained(directory, **options)
    AutoModel.from_pretrained(directory, tie_word_embeddings=False, **options)


def test_a_prefix_on_disk_is_refused(published: Path, tmp_path: Path) -> None:
    options = {"pre_seq_len": 3, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match=r"prefix on disk.*keep transformer"):
        AutoModel.from_pretrained(published, device_map={"": "disk"}, **options)
    parts = dict.fromkeys(PARTS, "disk") | {"transformer.prefix_encoder": "cpu"}
    model = AutoModel.from_pretrained(published, device_map=parts, **options)
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7, 1001, 1004]])).logits.isfinite().all()


def two_equal_tables(model: ChatGLMForConditionalGeneration) -> bool:
    table, head = model.transformer.word_embeddings.weight, model.lm_head.weight
    return torch.equal(table, head) and table.data_ptr() != head.data_ptr()


@pytest.mark.parametrize("load", [AutoModel, ChatGLMForConditionalGeneration])
@pytest.mark.parametrize("stored_once", [False, True])
def test_a_tied_model_is_untied_on_request(
    golden: Path, tmp_path: Path, load: Any, stored_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "COPY_BYTES", 0)  # as if the tables were large
    directory = make_published(golden, tmp_path / "tied")
    if stored_once:
        AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "once")
        directory = tmp_path / "once"
    model = load.from_pretrained(directory, tie_word_embeddings=False)
    assert not model.config.tie_word_embeddings
    assert two_equal_tables(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.transformer.word_embeddings.weight.abs().sum() > 0, "no memory is shared"


def test_a_packed_tied_model_is_untied_on_request(golden: Path, tmp_path: Path) -> None:
    tied = AutoModel.from_pretrained(make_published(golden, tmp_path / "tied"))
    quantize_embeddings_(tied)
    tied.save_pretrained(tmp_path / "packed")
    model = AutoModel.from_pretrained(tmp_path / "packed", tie_word_embeddings=False)
    assert two_equal_tables(model)
    ids = torch.tensor([[5, 6, 7, 1001, 1004]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tied(ids).logits)


def test_an_untied_model_with_equal_tables_stays_untied(golden: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(
        make_published(golden, tmp_path / "tied"), tie_word_embeddings=False
    )
    model.save_pretrained(tmp_path / "untied")
    assert two_equal_tables(AutoModel.from_pretrained(tmp_path / "untied"))


def test_a_model_built_from_a_config_leaves_it_as_it_was(golden: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_published(golden, tmp_path / "tied"))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # as accelerate's init_empty_weights does
    assert is_tied(AutoModelForCausalLM.from_pretrained(tmp_path / "tied", config=config))


@pytest.mark.parametrize("load", [AutoModel, ChatGLMForConditionalGeneration])
def test_arguments_that_would_bypass_the_check_are_refused(published: Path, load: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dict is given.*load_state_dict"):
        load.from_pretrained(published, state_dict={})
    with pytest.raises(ValueError, match="ignore_mismatched_sizes is given"):
        load.from_pretrained(published, ignore_mismatched_sizes=True)
    load.from_pretrained(published, state_dict=None, ignore_mismatched_sizes=False)
