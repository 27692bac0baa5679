import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptuning.__main__ import main
from ptuning.model.checkpoint.layout import read_checkpoint
from tests.model.published import make_published, make_safetensors


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("published", {"pytorch_model.bin"}),
        ("peft", {"adapter_config.json", "adapter_model.safetensors"}),
        ("kv", {"prefix_key_values.safetensors"}),
    ],
)
def test_export_writes_the_files_of_its_form(
    golden: Path, tmp_path: Path, form: str, files: set[str]
) -> None:
    base = make_safetensors(golden, tmp_path / "base")
    prefix = golden / "chatglm-tiny" / "prefix.safetensors"
    arguments = ["export", str(prefix), str(tmp_path / "out"), "--format", form]
    assert main([*arguments, "--model_name_or_path", str(base)]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_exported_values_are_the_prefixs(golden: Path, tmp_path: Path) -> None:
    base = make_safetensors(golden, tmp_path / "base")
    prefix = golden / "chatglm-tiny" / "prefix.safetensors"
    main(
        ["export", str(prefix), str(tmp_path), "--format", "kv", "--model_name_or_path", str(base)]
    )
    table = load_file(prefix)["embedding.weight"].float().view(8, 56, 2, 16)
    found = load_file(tmp_path / "prefix_key_values.safetensors")
    assert torch.equal(found["layers.3.key"], table[:, 6].transpose(0, 1))
    assert torch.equal(found["layers.3.value"], table[:, 7].transpose(0, 1))


def test_export_without_the_base_says_what_to_type(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = golden / "chatglm-tiny" / "prefix.safetensors"
    assert main(["export", str(prefix), str(tmp_path), "--format", "kv"]) == 2
    assert capsys.readouterr().err.endswith("--model_name_or_path DIRECTORY\n")


def test_convert_writes_what_it_says(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_published(golden, tmp_path / "source")
    with caplog.at_level(logging.INFO, logger="ptuning"):
        assert main(["convert", str(source), str(tmp_path / "out"), "--quantization_bit", "4"]) == 0
    summary = read_checkpoint(tmp_path / "out")
    assert summary.quantization_bits == 4
    assert f"{tmp_path / 'out'}: {summary}" in caplog.messages


def test_convert_refuses_a_destination_in_use(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_published(golden, tmp_path / "source")
    assert main(["convert", str(source), str(source)]) == 2
    text = capsys.readouterr().err
    assert (
        text == f"ptuning convert: {source} is already there and not empty; give a new directory.\n"
    )
