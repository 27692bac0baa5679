"""From a directory or a hub id to a directory on this disk.

Only JSON files, the vocabulary and weights are fetched, never a repository's code. Files that were
fetched before are not fetched again.
"""

import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ptuning.model.checkpoint.files import ACCEPTED, INDEX_OF
from ptuning.storage import ADAPTER_CONFIG_NAME, ADAPTER_FILES, INFO_NAME

CONFIG_FILE = "config.json"
COMPANION_FILES = ("tokenizer_config.json", "generation_config.json", "ice_text.model")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
NOT_ON_THE_HUB = (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    EntryNotFoundError,
)


def find_directory(
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    **hub_arguments: Any,
) -> Path:
    """Return the directory of a model given as a directory or as a hub id, whose files are fetched.

    hub_arguments are hf_hub_download's: cache_dir, force_download, local_files_only, token,
    revision. FileNotFoundError when there is neither such a directory nor such a repository, or it
    has no weights.
    """
    path = Path(name_or_path)
    if path.exists():
        return path / subfolder
    repository = os.fspath(name_or_path)
    fetch = _fetcher(repository, subfolder, hub_arguments)
    try:
        config = fetch(CONFIG_FILE)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is not a directory, and it is neither in the hub's cache nor can the "
            "hub be reached; give a model's directory, or download it first."
        ) from error
    except NOT_ON_THE_HUB as error:
        raise FileNotFoundError(
            f"{repository} is neither a directory nor a model on the hub with a {CONFIG_FILE} "
            f"({type(error).__name__}); check the spelling, e.g. THUDM/chatglm-6b."
        ) from error
    _fetch_weights(fetch, repository, ACCEPTED[use_safetensors])
    for name in COMPANION_FILES:
        _fetch_if_there(fetch, name)
    return Path(config).parent


def find_adapter(
    name_or_path: str | os.PathLike[str], *, subfolder: str = "", **hub_arguments: Any
) -> Path | None:
    """Return the directory of an adapter given as find_directory's; None where there is none."""
    path = Path(name_or_path)
    if path.exists():
        directory = path / subfolder
        return directory if (directory / ADAPTER_CONFIG_NAME).is_file() else None
    fetch = _fetcher(os.fspath(name_or_path), subfolder, hub_arguments)
    try:
        config = fetch(ADAPTER_CONFIG_NAME)
    except NOT_ON_THE_HUB:
        return None  # find_directory says what is wrong, if anything is
    any(_fetch_if_there(fetch, name) for name in ADAPTER_FILES)
    _fetch_if_there(fetch, INFO_NAME)
    return Path(config).parent


def has_network() -> bool:
    """Say whether the hub's name resolves; without a network huggingface_hub retries for long."""
    if urllib.request.getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _fetcher(
    repository: str, subfolder: str, hub_arguments: dict[str, Any]
) -> Callable[[str], str]:
    """Return what fetches a file of a repository by its name and returns its path."""
    if not has_network():
        hub_arguments = hub_arguments | {"local_files_only": True}
    return partial(hf_hub_download, repository, subfolder=subfolder or None, **hub_arguments)


def _fetch_if_there(fetch: Callable[[str], str], name: str) -> Path | None:
    try:
        return Path(fetch(name))
    except EntryNotFoundError:
        return None  # this repository has no such file


def _fetch_weights(fetch: Callable[[str], str], repository: str, accepted: tuple[str, ...]) -> None:
    for name in accepted:
        index = _fetch_if_there(fetch, INDEX_OF[name])
        if index is not None:
            weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
            for shard in sorted(set(weight_map.values())):
                fetch(shard)
            return
        if _fetch_if_there(fetch, name) is not None:
            return
    raise FileNotFoundError(
        f"{repository} has no {' or '.join(accepted)} on the hub; give another model, or a "
        "directory."
    )
