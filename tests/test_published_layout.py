"""Directories laid out as published, through main.py: eight float16 shards, the slim int4 release, prefixes of 2023.

The weights are the golden tiny model's, 28 layers; the vocabulary is that of tests.tiny, whose control ids the
configuration is given. Each directory holds a modeling_chatglm.py that would end the run if anything read it.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from main import main
from ptuning.data.tokenizer import ChatGLMTokenizer
from tests.model.published import (
    golden_config,
    golden_tensors,
    published_order,
    write_companions,
    write_shards,
)
from tests.tiny import leave_picture_out, make_base, rows, write_rows

PREFIX_LENGTH = 8  # of the golden prefix


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts as `float16` and `int4`, rows, and the golden prefix as the published code saved it."""
    folder = tmp_path_factory.mktemp("published")
    make_base(folder / "vocabulary", num_layers=1)
    tokenizer = ChatGLMTokenizer(folder / "vocabulary" / "ice_text.model")
    ids = {
        "bos_token_id": tokenizer.sop_token_id,
        "eos_token_id": tokenizer.eop_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
    }
    for directory, kind, config in (
        (folder / "float16", "model", golden_config(golden, **ids)),
        (folder / "int4", "model-int4", golden_config(golden, quantization_bit=4, **ids)),
    ):
        tensors = golden_tensors(golden, kind)
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]  # as published
        write_companions(directory, config)
        shutil.copy(folder / "vocabulary" / "ice_text.model", directory)
        write_shards(directory, published_order(tensors), num_shards=8 if kind == "model" else 1)
    write_rows(folder / "train.json", rows(6))
    write_rows(folder / "dev.json", rows(9)[6:])
    table = load_file(golden / "chatglm-tiny" / "prefix.safetensors")["embedding.weight"]
    prefix = {"transformer.prefix_encoder.embedding.weight": table}
    for name, tensors in (("prefix", prefix), ("whole", golden_tensors(golden) | prefix)):
        (folder / name).mkdir()
        torch.save(tensors, folder / name / "pytorch_model.bin")
    return folder


@pytest.fixture(autouse=True)
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_picture_out(monkeypatch)


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def flags(folder: Path, base: str, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / base), "--output_dir", str(out)),
        *("--test_file", str(folder / "dev.json"), "--token_cache_dir", str(folder / "tokens")),
        *("--max_source_length", "32", "--max_target_length", "8"),
        *("--per_device_eval_batch_size", "3", "--disable_tqdm", "true"),
        *("--measure_retention", "false", *more),  # 40 prompts through a full vocabulary
    ]


def train(folder: Path, base: str, out: Path, *more: str) -> int:
    return main(
        [
            *flags(folder, base, out, "--do_train", "--train_file", str(folder / "train.json")),
            *("--pre_seq_len", "4", "--max_steps", "2", "--learning_rate", "2e-2", *more),
        ]
    )


def table_of(directory: Path) -> torch.Tensor:
    (table,) = load_file(directory / "prefix.safetensors").values()
    return table


def answers(directory: Path) -> list[dict[str, str]]:
    text = (directory / "generated_predictions.txt").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("base", "found"),
    [("float16", "float16 weights, "), ("int4", "int4 weights, ")],
)
def test_the_directory_loads_trains_and_answers_as_it_lies(
    base: str, found: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = digests(folder / base)
    with caplog.at_level(logging.INFO):
        assert train(folder, base, tmp_path, "--do_predict", "--save_steps", "1") == 0
    (summary,) = [text for text in caplog.messages if text.startswith(str(folder / base))]
    assert found in summary
    assert summary.endswith("8 files" if base == "float16" else "1 file")
    assert not table_of(tmp_path).equal(table_of(tmp_path / "checkpoint-1"))
    assert len(answers(tmp_path)) == 3
    assert digests(folder / base) == before


def test_quantising_on_the_fly_trains_the_prefix_that_the_int4_release_trains(
    folder: Path, tmp_path: Path
) -> None:
    assert train(folder, "float16", tmp_path / "fly", "--quantization_bit", "4") == 0
    assert train(folder, "int4", tmp_path / "stored") == 0
    assert train(folder, "float16", tmp_path / "float16") == 0
    assert table_of(tmp_path / "fly").equal(table_of(tmp_path / "stored"))
    assert not table_of(tmp_path / "fly").equal(table_of(tmp_path / "float16"))


def test_a_prefix_trained_on_one_layout_is_scored_on_the_other(
    folder: Path, tmp_path: Path
) -> None:
    assert train(folder, "float16", tmp_path / "trained") == 0
    prefix = ["--ptuning_checkpoint", str(tmp_path / "trained")]
    assert main(flags(folder, "int4", tmp_path / "scores", "--do_predict", *prefix)) == 0
    assert len(answers(tmp_path / "scores")) == 3


@pytest.mark.parametrize("base", ["float16", "int4"])
def test_an_old_prefix_is_scored_alone_or_among_the_whole_model(
    base: str, folder: Path, golden: Path, tmp_path: Path
) -> None:
    losses = {}
    for kind, prefix in {
        "alone": ["--ptuning_checkpoint", str(folder / "prefix")],
        "among the model": ["--ptuning_checkpoint", str(folder / "whole")],
        "golden": ["--ptuning_checkpoint", str(golden / "chatglm-tiny" / "prefix.safetensors")],
        "fresh": ["--pre_seq_len", str(PREFIX_LENGTH)],
    }.items():
        out = tmp_path / kind
        validation = ["--do_eval", "--validation_file", str(folder / "dev.json")]
        assert main(flags(folder, base, out, "--do_predict", *validation, *prefix)) == 0
        assert len(answers(out)) == 3
        results = (out / "eval_results.json").read_text(encoding="utf-8")
        losses[kind] = json.loads(results)["eval_loss"]
    assert losses["alone"] == losses["among the model"] == losses["golden"]
    assert losses["alone"] != losses["fresh"], "the values are used, not the shape alone"


def test_an_old_prefix_can_be_trained_further(folder: Path, tmp_path: Path) -> None:
    more = ["--ptuning_checkpoint", str(folder / "prefix"), "--pre_seq_len", str(PREFIX_LENGTH)]
    assert train(folder, "float16", tmp_path, *more) == 0
    start = torch.load(folder / "prefix" / "pytorch_model.bin", weights_only=True)
    moved = (table_of(tmp_path) - next(iter(start.values())).float()).abs()
    # Adam moves an entry by at most the learning rate a step, and the rate falls: 2e-2 + 1e-2.
    assert 0 < moved.max() <= 0.0301


def test_a_contradicting_length_names_both(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = ["--ptuning_checkpoint", str(folder / "prefix"), "--pre_seq_len", "16"]
    assert main(flags(folder, "float16", tmp_path, "--do_predict", *prefix)) == 2
    error = capsys.readouterr().err
    assert "--pre_seq_len is 16" in error
    assert f"has {PREFIX_LENGTH}" in error
    assert not (tmp_path / "generated_predictions.txt").exists()


def test_bits_that_contradict_the_stored_ones_name_both(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "int4", tmp_path, "--quantization_bit", "8") == 2
    error = capsys.readouterr().err
    assert "quantization_bit is 8" in error
    assert "stored with 4 bits" in error
