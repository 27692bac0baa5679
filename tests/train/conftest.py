"""Short real runs of main.py on a two-layer base, for the tests of what happens to them."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from main import main
from tests.tiny import leave_picture_out, make_base, rows, write_rows


class ShortRun:
    """Six steps, a checkpoint every two, on 30 rows."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self.out = folder / "out"

    def flags(self, *more: str, out: Path | None = None) -> list[str]:
        return [
            *("--do_train", "--use_cpu", "true", "--disable_tqdm", "true"),
            *("--model_name_or_path", str(self.base), "--output_dir", str(out or self.out)),
            *("--train_file", str(self.folder / "train.json")),
            *("--validation_file", str(self.folder / "dev.json")),
            *("--pre_seq_len", "4", "--max_source_length", "32", "--max_target_length", "12"),
            *("--max_steps", "6", "--save_steps", "2", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", "--learning_rate", "2e-2"),
            *more,
        ]

    def start(self, *more: str, out: Path | None = None) -> int:
        """Run main.py's main in this process and return its exit code."""
        return main(self.flags(*more, out=out))

    def prefix(self, out: Path | None = None) -> dict:
        return load_file((out or self.out) / "prefix.safetensors")

    def checkpoints(self, out: Path | None = None) -> list[str]:
        names = [p.name for p in (out or self.out).iterdir() if p.name.startswith("checkpoint-")]
        return sorted(names)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def short_run(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    leave_picture_out(monkeypatch)
    write_rows(tmp_path / "train.json", rows(30))
    write_rows(tmp_path / "dev.json", rows(40)[30:])
    return ShortRun(tiny_base, tmp_path)
