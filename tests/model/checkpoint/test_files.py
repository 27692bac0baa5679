from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptuning.model.checkpoint import files as checkpoint_files
from ptuning.model.checkpoint.files import (
    CheckpointReader,
    StoredTensor,
    read_headers,
    same_values,
)

ROWS = 2**19  # times 4 bytes is 2 MiB: large enough to be mapped


@pytest.fixture(params=["bin", "safetensors"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = {f"large.{index}": torch.full((ROWS,), float(index)) for index in range(6)}
    tensors |= {"small": torch.arange(8.0), "same": torch.zeros(ROWS), "short": torch.zeros(8)}
    if request.param == "bin":
        torch.save(tensors, tmp_path / "w.bin")
    else:
        save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / f"w.{request.param}"


@pytest.fixture
def reader(file: Path) -> CheckpointReader:
    return CheckpointReader(read_headers({file: []}))


def test_values_are_read_when_they_are_indexed(reader: CheckpointReader) -> None:
    stored = StoredTensor.of(reader, "small")
    assert (stored.dtype, stored.shape, stored.num_bytes) == (torch.float32, (8,), 32)
    assert stored.is_floating_point()
    assert torch.equal(stored[...], torch.arange(8.0))
    assert torch.equal(stored[2:4], torch.tensor([2.0, 3.0]))


def test_mapping_is_renewed_so_that_pages_are_given_back(
    reader: CheckpointReader, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    name = "map_bin" if file.suffix == ".bin" else "open_safetensors"
    really_open = getattr(checkpoint_files, name)
    monkeypatch.setattr(checkpoint_files, name, lambda f: (opened.append(f), really_open(f))[1])
    monkeypatch.setattr(checkpoint_files, "REMAP_BYTES", 2 * ROWS * 4)
    for index in range(6):
        assert torch.equal(reader.read(f"large.{index}"), torch.full((ROWS,), float(index)))
    assert opened == [file] * 3, "two tensors for one mapping"


def test_tensors_outlive_the_mapping_they_came_from(
    reader: CheckpointReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "REMAP_BYTES", 1)
    first = reader.read("large.3")
    reader.read("large.4")
    assert first[-1] == 3.0


def test_small_tensors_are_copies_and_do_not_hold_the_file(tmp_path: Path) -> None:
    torch.save({"small": torch.ones(8), "large": torch.ones(ROWS)}, tmp_path / "w.bin")
    reader = CheckpointReader(read_headers({tmp_path / "w.bin": []}))
    assert reader.read("small").untyped_storage().nbytes() == 32
    with (tmp_path / "w.bin").open("r+b") as stream:  # writing through shows in what is mapped
        content = stream.read()
        small = reader.read("small")
        stream.seek(0)
        stream.write(
            content.replace(torch.ones(8).numpy().tobytes(), torch.zeros(8).numpy().tobytes(), 1)
        )
    assert torch.equal(small, torch.ones(8))


def test_equal_values_are_told_from_others(reader: CheckpointReader) -> None:
    headers = reader.headers
    assert same_values(headers, "large.0", "same")
    assert not same_values(headers, "large.1", "same")
    assert not same_values(headers, "short", "same")


def test_nan_equals_nothing(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan")])
    torch.save({"a": values, "b": values.clone()}, tmp_path / "w.bin")
    assert not same_values(read_headers({tmp_path / "w.bin": []}), "a", "b")
