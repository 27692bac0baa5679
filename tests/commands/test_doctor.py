"""The doctor's picks are those of a run, and what it says is missing is missing."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from arguments import parse_arguments
from ptuning.__main__ import main
from ptuning.commands import doctor
from ptuning.model.quantization.backends import BACKEND_NAMES, get_backend
from ptuning.train.processes import trainer_arguments
from ptuning.tunings.loading import choose_dtype
from tests.model.published import make_safetensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "tokens"))
    return tmp_path / "tokens"


@pytest.fixture
def diagnosed(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_defaults_are_those_of_a_run(
    diagnosed: dict, golden: Path, cache: Path, tmp_path: Path
) -> None:
    flags = [
        "--do_train",
        "--model_name_or_path",
        "my/base",
        "--train_file",
        "t",
        "--pre_seq_len",
        "4",
    ]
    device = trainer_arguments(parse_arguments([*flags, "--output_dir", "o"])).device
    model = AutoModelForCausalLM.from_pretrained(make_safetensors(golden, tmp_path / "base"))
    found = diagnosed["defaults"]
    assert found["device"] == str(device)
    assert found["base_dtype"] == str(choose_dtype(device, None)).removeprefix("torch.")
    assert found["attention"] == model.config._attn_implementation
    assert found["token_cache"] == str(cache)
    assert found["int4_backend"] in BACKEND_NAMES
    assert found["int8_backend"] in BACKEND_NAMES


def test_every_back_end_is_there_or_has_its_reason(diagnosed: dict) -> None:
    device = torch.device(diagnosed["defaults"]["device"])
    dtype = getattr(torch, diagnosed["defaults"]["base_dtype"])
    assert [report["name"] for report in diagnosed["backends"]] == list(BACKEND_NAMES)
    for report in diagnosed["backends"]:
        reason = get_backend(report["name"]).unavailable_reason(device, dtype)
        assert report["available"] == (reason is None)
        assert report["available"] or reason in report["reason"]


def test_packages_have_the_versions_that_are_installed(diagnosed: dict) -> None:
    packages = {package["name"]: package for package in diagnosed["packages"]}
    assert {"torch", "transformers", "sentencepiece", "triton", "cpm_kernels"} <= set(packages)
    assert "pytest" not in packages, "what only the checks need is left out"
    assert packages["torch"]["found"] == metadata.version("torch")
    assert packages["torch"]["needed_for"] == "all commands"
    assert packages["torch"]["fits"]
    assert packages["cpm_kernels"]["needed_for"] == "cuda"


def test_devices_have_memory_and_float32_is_the_measure(diagnosed: dict) -> None:
    cpu = diagnosed["devices"][0]
    assert cpu["name"] == "cpu"
    assert 0 < cpu["free_bytes"] <= cpu["memory_bytes"]
    assert set(diagnosed["cpu_speed"]) == {"float32", "bfloat16", "float16"}
    assert diagnosed["cpu_speed"]["float32"] == 1
    assert all(speed > 0 for speed in diagnosed["cpu_speed"].values())


def test_the_table_is_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for title in (
        "Versions",
        "Packages",
        "Devices",
        "Back ends of int4 and int8",
        "Defaults of main.py",
    ):
        assert f"{title}" in text
    assert text.endswith("\nNothing that is needed is missing.\n")
    block = text.partition("Packages\n")[2].partition("\n\n")[0].splitlines()
    column = block[0].index("all commands")
    needed = [line for line in block if "all commands" in line]
    assert len(needed) > 5
    assert {line.index("all commands") for line in needed} == {column}
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_a_missing_package_is_named_and_strict_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "jieba":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "nltk" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert main(["doctor"]) == 0
    assert main(["doctor", "--strict"]) == 1
    text = capsys.readouterr().out
    assert "Needed: jieba>=0.42.1 (not installed): pip install 'jieba>=0.42.1'" in text
    assert "Needed: nltk>=3.9 (1.0): pip install 'nltk>=3.9'" in text
    assert "Nothing that is needed is missing" not in text


def test_strict_is_content_where_only_extras_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("triton", "cpm_kernels", "tensorboard"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert main(["doctor", "--strict"]) == 0


def test_a_cache_that_cannot_be_written_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "file" / "tokens"))
    assert main(["doctor", "--strict"]) == 1
    assert "set PTUNING_CACHE to a folder" in capsys.readouterr().out


def test_looking_writes_nothing(diagnosed: dict, cache: Path) -> None:
    assert diagnosed["missing"] == []
    assert not cache.exists()


def test_a_dtype_without_a_back_end_is_said_and_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "choose_dtype", lambda device, requested: torch.float64)
    assert main(["doctor", "--strict"]) == 1
    text = capsys.readouterr().out
    assert "Needed: a back end for int4 weights on" in text
    assert "none: no quantization backend can run int4 weights and float64" in text


def test_an_installed_projects_extras_are_read_from_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["torch>=2.8", 'tensorboard>=2.18; extra == "tensorboard"', 'pytest>=9; extra == "dev"']
    monkeypatch.setattr(doctor, "PROJECT_FILE", tmp_path / "pyproject.toml")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    found = [(package.name, package.needed_for) for package in doctor.find_packages()]
    assert found == [("torch", "all commands"), ("tensorboard", "tensorboard"), ("triton", "cuda")]
