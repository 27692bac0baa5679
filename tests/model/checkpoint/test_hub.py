"""Hub ids, against a cache as huggingface_hub lays it out on disk; no network is touched."""

import socket
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel

from ptuning.model.checkpoint.files import find_adapter, find_directory
from tests.model.published import make_published, make_safetensors

REPOSITORY = "someone/chatglm-6b"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and peft ask the hub about adapters even where the files are here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "models--someone--chatglm-6b"
    make_published(golden, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return tmp_path / "hub"


def test_cached_repository_is_found_and_loads(cache: Path) -> None:
    directory = find_directory(REPOSITORY, cache_dir=cache, local_files_only=True)
    assert directory == cache / "models--someone--chatglm-6b" / "snapshots" / COMMIT
    model = AutoModel.from_pretrained(REPOSITORY, cache_dir=cache, local_files_only=True)
    assert model.config.tie_word_embeddings
    assert model.name_or_path == REPOSITORY


def test_kind_that_the_repository_lacks_is_an_error(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors on the hub"):
        find_directory(REPOSITORY, cache_dir=cache, local_files_only=True, use_safetensors=True)


def test_repository_that_is_not_cached_is_an_error_in_one_line(cache: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="neither in the hub's cache nor can the hub be reached"
    ) as error:
        find_directory("someone/else", cache_dir=cache, local_files_only=True)
    assert "\n" not in str(error.value)


def test_without_a_network_the_cache_alone_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub would retry for half a minute, with two lines for each try."""

    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it retries"))
    assert find_directory(REPOSITORY, cache_dir=cache).name == COMMIT
    assert find_adapter(REPOSITORY, cache_dir=cache) is None
    with pytest.raises(FileNotFoundError, match="neither in the hub's cache nor can the hub"):
        find_directory("someone/else", cache_dir=cache)


@pytest.mark.parametrize("name", ["./output/chatglm", "a/b/c", "no such model!"])
def test_name_that_cannot_be_a_hub_id_is_a_missing_directory(cache: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a directory nor a model on the hub"):
        find_directory(name, cache_dir=cache, local_files_only=True)


def test_fetching_asks_for_weights_and_settings_and_never_for_code(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache / "models--someone--chatglm-6b" / "snapshots" / COMMIT
    asked: list[str] = []

    def fetch(repository: str, name: str, *, subfolder: str | None, **arguments: object) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert (repository, subfolder, arguments) == (REPOSITORY, None, {"revision": "v1"})
        asked.append(name)
        if not (snapshot / name).is_file():
            raise LocalEntryNotFoundError(name)
        return str(snapshot / name)

    monkeypatch.setattr("ptuning.model.checkpoint.files.has_network", lambda: True)
    monkeypatch.setattr("ptuning.model.checkpoint.files.hf_hub_download", fetch)
    assert find_directory(REPOSITORY, revision="v1") == snapshot
    shards = {f"pytorch_model-{k:05d}-of-00008.bin" for k in range(1, 9)}
    assert shards <= set(asked)
    assert not [name for name in asked if name.endswith(".py")]


def test_fetching_an_adapter_asks_for_its_weights_and_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(repository: str, name: str, **arguments: object) -> str:
        asked.append(name)
        if name == "adapter_model.safetensors":
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("ptuning.model.checkpoint.files.has_network", lambda: True)
    monkeypatch.setattr("ptuning.model.checkpoint.files.hf_hub_download", fetch)
    assert find_adapter("someone/adapter") == tmp_path
    weights = ["adapter_model.safetensors", "adapter_model.bin"]
    assert asked == ["adapter_config.json", *weights, "tuning_config.json"]


def test_subfolder_of_a_directory(golden: Path, tmp_path: Path) -> None:
    make_safetensors(golden, tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path, subfolder="model", dtype=torch.float32)
    assert model.dtype == torch.float32
    assert find_directory(tmp_path, subfolder="model") == tmp_path / "model"
