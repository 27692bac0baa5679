"""The full-size proof in small: what it writes is a published layout, what it makes it removes, what it says was measured."""

import json
import shutil
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from benchmarks import full_size, random_checkpoint
from benchmarks.random_checkpoint import (
    check_room,
    checkpoint_bytes,
    stored_shapes,
    write_checkpoint,
)
from ptuning.model.checkpoint.layout import HEAD, read_checkpoint

SIZE = (2, 32, 2, 64)  # layers, hidden size, heads, vocabulary


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_checkpoint.SIZES, "small", SIZE)


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_what_is_written_is_a_published_layout(bits: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "small", bits)
    summary = read_checkpoint(tmp_path)
    assert summary.quantization_bits == bits
    assert summary.dtype == torch.float16
    names = sorted(path.name for path in tmp_path.iterdir())
    if bits:
        assert names == ["config.json", "pytorch_model.bin"]
    else:
        shards = [f"pytorch_model-{number:05d}-of-00008.bin" for number in range(1, 9)]
        assert names == ["config.json", *shards, "pytorch_model.bin.index.json"]
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    zip_headers = 1000 * len(
        stored_shapes("small", bits)
    )  # torch.save aligns and names each tensor
    assert (
        checkpoint_bytes("small", bits) <= on_disk < checkpoint_bytes("small", bits) + zip_headers
    )


def test_the_full_size_is_that_of_the_published_files() -> None:
    """12.35 GB of distinct float16 values and the head once more; int4 3.89 GB, as its release is."""
    assert checkpoint_bytes("chatglm-6b", 0) == pytest.approx(13.42e9, rel=1e-3)
    assert checkpoint_bytes("chatglm-6b", 4) == pytest.approx(3.89e9, rel=1e-3)
    assert stored_shapes("chatglm-6b", 4)[HEAD] == (torch.float16, (130528, 4096))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories written to; in this process, because another one would not know the size above."""
    directories: list[Path] = []

    def write(directory: Path, flags: Namespace) -> full_size.Stage:
        directories.append(directory)
        write_checkpoint(directory, flags.size, flags.stored_bit)
        return full_size.Stage("write", 1.0, 10**9, None)

    monkeypatch.setattr(full_size, "write", write)
    return directories


@pytest.mark.parametrize("bits", ["0", "4", "8"])
def test_a_run_loads_steps_measures_and_removes(
    bits: str, made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--size", "small", "--device", "cpu", "--prefix", "3", "--steps", "2"]
    assert full_size.main([*arguments, "--quantization_bit", bits, "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    stages = figures["stages"]
    assert [stage["name"] for stage in stages] == ["write", "load", "step 1", "step 2"]
    assert all(stage["time_s"] > 0 for stage in stages)
    peaks = [stage["host_peak_bytes"] for stage in stages[1:]]
    assert figures["weight_bytes"] < peaks[0] <= peaks[1] <= peaks[2]
    assert f"{figures['weight_bytes'] / 1e9:.2f} GB in memory" in capsys.readouterr().out
    (directory,) = made
    assert not directory.exists()


def test_quantising_as_it_is_read_needs_the_float_release(made: list[Path], tmp_path: Path) -> None:
    arguments = [
        "--size",
        "small",
        "--device",
        "cpu",
        "--directory",
        str(tmp_path / "kept"),
        "--keep",
    ]
    assert full_size.main([*arguments, "--stored_bit", "0", "--quantization_bit", "4"]) == 0
    assert read_checkpoint(tmp_path / "kept").num_shards == 8
    assert full_size.main(arguments) == 0, "what is there is loaded as it lies"
    assert made == [tmp_path / "kept"]
    with pytest.raises(SystemExit, match="2"):
        full_size.main([*arguments, "--stored_bit", "8"])


def test_a_directory_of_somebodys_is_never_removed(
    made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert full_size.main(["--size", "small", "--directory", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert made == []


def test_writing_that_fails_leaves_nothing_even_with_keep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(directory: Path, flags: Namespace) -> full_size.Stage:
        (directory / "pytorch_model.bin").write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(full_size, "write", write)
    arguments = ["--size", "small", "--directory", str(tmp_path / "new"), "--keep"]
    assert full_size.main(arguments) == 2
    assert capsys.readouterr().err == "full_size: the disk is full\n"
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: list[Path]
) -> None:
    usage = namedtuple("usage", "total used free")(10**10, 10**10, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 4\.2 GB and its disk has 1\.0 GB free"):
        check_room(tmp_path / "not" / "yet", checkpoint_bytes("chatglm-6b", 4))
    assert full_size.main(["--directory", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert made == []
