"""Weight files: fetch them from the hub, find them, read their headers, and tensors on demand.

Of a hub repository only JSON files, the vocabulary and weights are fetched, never code. Headers are
the JSON at the start of a .safetensors file, or the zip directory and tensor table of a .bin file,
read with torch's `weights_only` reader, which runs no code. Tensors are memory-mapped, so that a
checkpoint is never in memory twice: a tensor used in its stored dtype shares the file's pages; one
that is converted or moved to a GPU is copied, and its mapping is dropped soon after.
"""

import json
import math
import os
import pickle
import socket
import threading
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptuning.storage import ADAPTER_CONFIG_NAME, ADAPTER_FILES, INFO_NAME

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
VOCABULARY_FILE = "ice_text.model"
COMPANION_FILES = (TOKENIZER_CONFIG_FILE, GENERATION_CONFIG_FILE, VOCABULARY_FILE)
SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_FILE = "pytorch_model.bin"
INDEX_OF = {SAFETENSORS_FILE: SAFETENSORS_INDEX, BIN_FILE: BIN_INDEX}
# What use_safetensors accepts, in order of preference.
ACCEPTED = {None: (SAFETENSORS_FILE, BIN_FILE), True: (SAFETENSORS_FILE,), False: (BIN_FILE,)}

# The dtypes of the safetensors format that a ChatGLM checkpoint can hold.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}

NOT_ON_THE_HUB = (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    EntryNotFoundError,
)

# Pages of a mapping stay in memory until it is dropped, so it is renewed after this many bytes.
REMAP_BYTES = 64 * 2**20
# Smaller tensors are copied: a norm or a bias would keep the mapping of its whole file alive.
COPY_BYTES = 2**20

NUM_NAMES_SHOWN = 3  # of a list of tensors in an error; the rest is counted

_ZIP_MAGIC = b"PK\x03\x04"
_GIT_LFS_MAGIC = b"version https://git-lfs"
_COPY_AGAIN = "copy or download it again"


def find_directory(
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    **hub_arguments: Any,
) -> Path:
    """Return the directory of a model, given by its path or as a hub id, whose files are fetched.

    hub_arguments are hf_hub_download's: cache_dir, force_download, local_files_only, token,
    revision. FileNotFoundError when there is neither such a directory nor such a repository, or the
    repository has no weights.
    """
    path = Path(name_or_path)
    if path.exists():
        return path / subfolder
    repository = os.fspath(name_or_path)
    fetch = _fetcher(repository, subfolder, hub_arguments)
    try:
        directory = Path(fetch(CONFIG_FILE)).parent
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
    accepted = ACCEPTED[use_safetensors]
    if not any(_fetch_weights(fetch, name) for name in accepted):
        raise FileNotFoundError(
            f"{repository} has no {' or '.join(accepted)} on the hub; give another model, or a "
            "directory."
        )
    for name in COMPANION_FILES:
        _fetch_if_there(fetch, name)
    return directory


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
        directory = Path(fetch(ADAPTER_CONFIG_NAME)).parent
    except NOT_ON_THE_HUB:
        return None  # find_directory says what is wrong, if anything is
    any(_fetch_if_there(fetch, name) for name in ADAPTER_FILES)
    _fetch_if_there(fetch, INFO_NAME)
    return directory


def has_network() -> bool:
    """Return whether the hub's name resolves; without a network huggingface_hub keeps retrying."""
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
    """Return a function that fetches a file of the repository by its name and returns its path."""
    if not has_network():
        hub_arguments = hub_arguments | {"local_files_only": True}
    return partial(hf_hub_download, repository, subfolder=subfolder or None, **hub_arguments)


def _fetch_if_there(fetch: Callable[[str], str], name: str) -> Path | None:
    try:
        return Path(fetch(name))
    except EntryNotFoundError:
        return None


def _fetch_weights(fetch: Callable[[str], str], name: str) -> bool:
    """Fetch weights under one of the names of ACCEPTED, or the shards its index lists, if any."""
    index = _fetch_if_there(fetch, INDEX_OF[name])
    if index is None:
        return _fetch_if_there(fetch, name) is not None
    for shard in sorted(set(_read_weight_map(index).values())):
        fetch(shard)
    return True


class TensorHeader(NamedTuple):
    """What is known of a stored tensor before it is read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def find_weight_files(
    directory: Path, *, use_safetensors: bool | None = None
) -> dict[Path, list[str]]:
    """Return the weight files in directory, each with the tensors that an index says it holds.

    Safetensors are preferred to .bin; use_safetensors True or False accepts only that kind.
    FileNotFoundError names every file that is missing.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"{directory} {what}; give the directory that holds config.json and the weights."
        )
    for name in ACCEPTED[use_safetensors]:
        if (directory / INDEX_OF[name]).is_file():
            return _shards_of(directory / INDEX_OF[name])
        if (directory / name).is_file():
            return {directory / name: []}
    shards = sorted(
        path.name
        for path in directory.iterdir()
        if path.name.startswith(("pytorch_model-", "model-")) and "-of-" in path.name
    )
    if shards:
        index = SAFETENSORS_INDEX if shards[0].endswith(".safetensors") else BIN_INDEX
        raise FileNotFoundError(
            f"{directory} has {shards[0]} but no {index}, which says what the shards hold; "
            f"{_COPY_AGAIN}."
        )
    wanted = " or ".join(
        f"{INDEX_OF[name]} or {name}" for name in reversed(ACCEPTED[use_safetensors])
    )
    raise FileNotFoundError(f"{directory} has no weights ({wanted}); download the model into it.")


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor; ValueError for an index that is damaged or forged."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not an index of weight files ({type(error).__name__}: {error}); "
            f"{_COPY_AGAIN}."
        ) from error
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} points outside its directory ({name!r}); {_COPY_AGAIN}.")
    return weight_map


def _shards_of(index: Path) -> dict[Path, list[str]]:
    """Return the tensors that an index lists, by file; FileNotFoundError names missing files."""
    shards: dict[Path, list[str]] = {}
    for name, file in sorted(_read_weight_map(index).items(), key=itemgetter(1)):
        shards.setdefault(index.parent / file, []).append(name)
    missing = [file for file in shards if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {', '.join(file.name for file in missing)} ({len(missing)} of "
            f"{len(shards)} shards, {sum(len(shards[file]) for file in missing)} tensors), which "
            f"{index.name} lists; download what is missing."
        )
    return shards


def read_headers(weight_files: Mapping[Path, list[str]]) -> dict[str, TensorHeader]:
    """Return the header of every tensor; ValueError names a file that is damaged or incomplete."""
    headers: dict[str, TensorHeader] = {}
    for file, expected in weight_files.items():
        found = dict(_headers_of(file))
        missing = next((name for name in expected if name not in found), None)
        if missing:
            raise ValueError(
                f"{file} does not hold {missing}, although the index next to it lists it; "
                f"{_COPY_AGAIN}, or the index."
            )
        headers.update(found)
    return headers


def _headers_of(file: Path) -> Iterator[tuple[str, TensorHeader]]:
    if file.suffix != ".safetensors":
        for name, value in map_bin(file).items():
            yield name, TensorHeader(file, value.dtype, tuple(value.shape))
        return
    with open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            piece = opened.get_slice(name)
            shape = tuple(piece.get_shape())
            stored = piece.get_dtype()
            if stored not in DTYPES:
                raise ValueError(
                    f"{file} has {name} of dtype {stored}; ChatGLM checkpoints hold "
                    f"{', '.join(DTYPES)}: convert it with the tool that wrote it."
                )
            yield name, TensorHeader(file, DTYPES[stored], shape)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return every tensor of a file; ValueError says how it is damaged."""
    if file.suffix != ".safetensors":
        return map_bin(file)
    with open_safetensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def open_safetensors(file: Path) -> safe_open:
    """Open a .safetensors file; ValueError says how it is damaged."""
    check_first_bytes(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); {_COPY_AGAIN}.") from error


def map_bin(file: Path) -> dict[str, Tensor]:
    """Return a .bin file's tensors, mapped and not read; ValueError says how it is damaged."""
    if check_first_bytes(file) != _ZIP_MAGIC:
        raise ValueError(
            f"{file} is not in the format torch.save has written since version 1.6: it is "
            f"damaged, so {_COPY_AGAIN}, or very old, so save it again with a current torch."
        )
    size = f"{file.stat().st_size:,} bytes"
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut short at {size}; {_COPY_AGAIN}.")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, which could run code when read, or is damaged, so it "
            "is not read; copy it again from a source you trust."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({size}); {_COPY_AGAIN}.") from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(
            f"{file} is not a table of tensors (it holds a {type(loaded).__name__}); give a "
            "model's pytorch_model.bin."
        )
    return loaded


def check_first_bytes(file: Path) -> bytes:
    """Return the first four bytes; ValueError for an empty file or a git-lfs pointer."""
    with file.open("rb") as stream:
        start = stream.read(len(_GIT_LFS_MAGIC))
    if not start:
        raise ValueError(f"{file} is empty; {_COPY_AGAIN}.")
    if start == _GIT_LFS_MAGIC:
        raise ValueError(
            f"{file} is a git-lfs pointer, a few lines in place of the weights; run `git lfs "
            f"pull` in {file.parent}."
        )
    return start[: len(_ZIP_MAGIC)]


class CheckpointReader:
    """Reads single tensors out of a checkpoint's files; may be called from several threads."""

    def __init__(self, headers: dict[str, TensorHeader]) -> None:
        self.headers = headers
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._get: Callable[[str], Tensor] | None = None
        self._handed_out_bytes = 0

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored, on the CPU; a large one is mapped from its file."""
        header = self.headers[name]
        with self._lock:
            is_worn = self._handed_out_bytes + header.num_bytes > REMAP_BYTES
            if self._get is None or self._file != header.file or is_worn:
                self._get = None  # drops the old mapping; tensors already handed out stay valid
                if header.file.suffix == ".safetensors":
                    self._get = open_safetensors(header.file).get_tensor
                else:
                    self._get = map_bin(header.file).__getitem__
                self._file, self._handed_out_bytes = header.file, 0
            self._handed_out_bytes += header.num_bytes
            value = self._get(name)
            return value.clone() if header.num_bytes < COPY_BYTES else value


class StoredTensor:
    """A tensor that is read when it is indexed; transformers' loader takes it for a tensor."""

    def __init__(
        self, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self._read = read

    @classmethod
    def of(cls, reader: CheckpointReader, name: str, *, copied: bool = False) -> "StoredTensor":
        """Return a tensor of the reader's checkpoint; copied: it shares no page of the file."""
        header = reader.headers[name]
        read = partial(reader.read, name)
        return cls(header.dtype, header.shape, (lambda: read().clone()) if copied else read)

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Return whether the values are floats, as Tensor.is_floating_point does."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Read the tensor and return the part that index selects; `[...]` for all of it."""
        return self._read()[index]


def same_values(headers: dict[str, TensorHeader], first: str, second: str) -> bool:
    """Return whether two tensors are stored and equal; both are mapped only meanwhile."""
    left, right = headers.get(first), headers.get(second)
    if left is None or right is None or left[1:] != right[1:]:  # dtype and shape
        return False
    return torch.equal(
        CheckpointReader(headers).read(first), CheckpointReader(headers).read(second)
    )


def check_finite(name: str, value: Tensor, file: Path) -> None:
    """Refuse a trained tensor with entries that are NaN or infinite (ValueError)."""
    if not value.isfinite().all():
        raise ValueError(
            f"{file} has {name} with entries that are not finite: its training had diverged, so "
            "give an earlier checkpoint."
        )


def shorten(names: list[str]) -> str:
    """List a few names and count the rest.

    >>> shorten(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - NUM_NAMES_SHOWN
    shown = ", ".join(names[:NUM_NAMES_SHOWN])
    return f"{shown} and {rest} more" if rest > 0 else shown
