"""The token cache: found by content, mapped, and never a reason to stop."""

from pathlib import Path

import numpy as np
import pytest

from ptuning.data.cache import (
    TokenArrays,
    cache_path,
    default_cache_dir,
    load_tokens,
    save_tokens,
)

ARRAYS = TokenArrays(
    ids=np.array([5, 6, 7, 8, 9], dtype=np.int32),
    offsets=np.array([0, 3, 5], dtype=np.int64),
    context_lengths=np.array([1, 1], dtype=np.int32),
)
NOTES = {"num_read": 3, "dropped": {'empty "答"': 1}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.safetensors"
    assert save_tokens(path, ARRAYS, NOTES)
    loaded = load_tokens(path)
    assert loaded is not None
    arrays, notes = loaded
    for array, original in zip(arrays, ARRAYS, strict=True):
        assert array.dtype == original.dtype
        assert array.tolist() == original.tolist()
    assert notes == NOTES
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing unfinished


def test_loaded_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, NOTES)
    loaded = load_tokens(path)
    assert loaded is not None
    assert str(path) in maps.read_text(encoding="utf-8")


def test_saving_again_replaces_a_file_that_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, NOTES)
    loaded = load_tokens(path)
    longer = ARRAYS._replace(ids=np.array([1, 2, 3, 4, 5], dtype=np.int32))
    assert save_tokens(path, longer, NOTES)
    assert loaded is not None
    assert loaded[0].ids.tolist() == ARRAYS.ids.tolist()  # the open one keeps its content


def test_no_file_is_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_tokens(tmp_path / "none.safetensors") is None
    assert caplog.text == ""


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_cut_file_is_announced_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS, NOTES)
    path.write_bytes(path.read_bytes()[:keep])
    assert load_tokens(path) is None
    assert f"the token cache {path} is broken" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": np.array([0, 3, 6], dtype=np.int64)},
        {"offsets": np.array([0, 3, 3, 5], dtype=np.int64)},
        {"offsets": np.array([1, 3, 5], dtype=np.int64)},
        {"offsets": np.array([0, 5], dtype=np.int64)},
        {"context_lengths": np.array([1, 2], dtype=np.int32)},
        {"context_lengths": np.array([-1, 1], dtype=np.int32)},
        {"ids": np.array([5, 6, 7, 8, -9], dtype=np.int32)},
        {"ids": np.array([5, 6, 7, 8, 9], dtype=np.int64)},
        {"ids": np.zeros((5, 1), dtype=np.int32)},
    ],
)
def test_arrays_that_do_not_fit_together_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict
) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, ARRAYS._replace(**changes), NOTES)
    assert load_tokens(path) is None
    assert "is broken" in caplog.text


def test_a_folder_that_cannot_be_written_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert not save_tokens(tmp_path / "file" / "tokens.safetensors", ARRAYS, NOTES)
    assert "the next run tokenises again" in caplog.text
    assert "PTUNING_CACHE" in caplog.text


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptuning.storage.os.fsync", run_out)
    assert not save_tokens(tmp_path / "tokens.safetensors", ARRAYS, NOTES)
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


def test_every_setting_has_its_own_file(tmp_path: Path) -> None:
    settings = {"file": "a", "recipe": "corrected", "max_rows": None}
    paths = {
        cache_path(tmp_path, "train", settings),
        cache_path(tmp_path, "train", dict(reversed(settings.items()))),
    }
    assert len(paths) == 1
    for key in settings:
        paths.add(cache_path(tmp_path, "train", {**settings, key: "other"}))
    assert len(paths) == 4


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("PTUNING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ptuning" / "tokens"
