"""Weight files on disk: which ones there are, what their headers say, and their tensors on demand.

Headers are the JSON at the start of a .safetensors file, or the zip directory and tensor table of a
.bin file, read with torch's `weights_only` reader, which runs no code. Tensors are memory-mapped,
so that a checkpoint is never in memory twice: a tensor used in its stored dtype shares the file's
pages; one that is converted or moved to a GPU is copied, and its mapping is dropped soon after.
"""

import json
import math
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_FILE = "pytorch_model.bin"
INDEX_OF = {SAFETENSORS_FILE: SAFETENSORS_INDEX, BIN_FILE: BIN_INDEX}
# What use_safetensors accepts, in order of preference.
ACCEPTED = {None: (SAFETENSORS_FILE, BIN_FILE), True: (SAFETENSORS_FILE,), False: (BIN_FILE,)}

# The dtype names of the safetensors format that a ChatGLM checkpoint can use.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Pages of a mapping stay in memory until it is dropped, so it is renewed after this many bytes.
REMAP_BYTES = 64 * 2**20
# Smaller tensors are copied: a norm or a bias would keep the mapping of its whole file alive.
COPY_BYTES = 2**20

NUM_NAMES_SHOWN = 3  # of a list of tensors in an error; the rest is counted

_ZIP_MAGIC = b"PK\x03\x04"
_GIT_LFS_MAGIC = b"version https://git-lfs"
_COPY_AGAIN = "copy or download it again"


class TensorHeader(NamedTuple):
    """What is known of a stored tensor before it is read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles(NamedTuple):
    """The files of one checkpoint; weight_map is tensor -> file name, empty without an index."""

    files: tuple[Path, ...]
    weight_map: dict[str, str]


def find_weight_files(directory: Path, *, use_safetensors: bool | None = None) -> WeightFiles:
    """Return the weight files in directory, safetensors before .bin where both are there.

    use_safetensors True or False accepts only that kind. FileNotFoundError names every file that is
    missing.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"{directory} {what}; give the directory that holds config.json and the weights."
        )
    for name in ACCEPTED[use_safetensors]:
        if (directory / INDEX_OF[name]).is_file():
            return _read_index(directory / INDEX_OF[name])
        if (directory / name).is_file():
            return WeightFiles((directory / name,), {})
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


def _read_index(index: Path) -> WeightFiles:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of weight files ({type(error).__name__}: {error}); "
            f"{_COPY_AGAIN}."
        ) from error
    directory = index.parent
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{index} points outside its directory ({outside[0]!r}); {_COPY_AGAIN}.")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        lost = sum(1 for file in weight_map.values() if file in missing)
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)} ({len(missing)} of {len(names)} shards, "
            f"{lost} tensors), which {index.name} lists; download what is missing."
        )
    return WeightFiles(tuple(directory / name for name in names), weight_map)


def read_headers(weight_files: WeightFiles) -> dict[str, TensorHeader]:
    """Return the header of every tensor; ValueError names a file that is damaged or incomplete."""
    headers: dict[str, TensorHeader] = {}
    for file in weight_files.files:
        expected = [name for name, shard in weight_files.weight_map.items() if shard == file.name]
        found = dict(_headers_of(file, expected))
        for name in expected:
            if name not in found:
                raise ValueError(
                    f"{file} does not hold {name}, although the index next to it lists it; "
                    f"{_COPY_AGAIN}, or the index."
                )
        headers.update(found)
    return headers


def _headers_of(file: Path, expected: list[str]) -> Iterator[tuple[str, TensorHeader]]:
    if file.suffix == ".safetensors":
        with open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                piece = opened.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{file}: {name} has dtype {piece.get_dtype()}; ChatGLM checkpoints hold "
                        f"{', '.join(SAFETENSORS_DTYPES)}: convert it with the tool that wrote it."
                    )
                yield name, TensorHeader(file, dtype, tuple(piece.get_shape()))
        return
    for name, value in map_bin(file, expected).items():
        yield name, TensorHeader(file, value.dtype, tuple(value.shape))


def open_safetensors(file: Path) -> safe_open:
    """Open a .safetensors file; ValueError says how it is damaged."""
    _check_first_bytes(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        cut = _first_tensor_cut(file)
        lost = f"it is cut short: {cut} is not whole" if cut else f"it is damaged ({error})"
        raise ValueError(f"{file} cannot be read: {lost}; {_COPY_AGAIN}.") from error


def map_bin(file: Path, expected: list[str] | None = None) -> dict[str, Tensor]:
    """Return a .bin file's tensors, mapped and not read; ValueError says how it is damaged.

    expected are the names the index promises, which is all that is known of a file that was cut
    short.
    """
    start = _check_first_bytes(file)
    if start != _ZIP_MAGIC:
        raise ValueError(
            f"{file} is not in the format torch.save has written since version 1.6: it is "
            f"damaged, so {_COPY_AGAIN}, or very old, so save it again with a current torch."
        )
    held = f", which should hold {shorten(expected)}" if expected else ""
    size = f"{file.stat().st_size:,} bytes"
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut short at {size}{held}; {_COPY_AGAIN}.")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, which could run code when read, or is damaged, so it "
            "is not read; copy it again from a source you trust."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({size}{held}); {_COPY_AGAIN}.") from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(
            f"{file} is not a table of tensors (it holds a {type(loaded).__name__}); give a "
            "model's pytorch_model.bin."
        )
    return loaded


def _check_first_bytes(file: Path) -> bytes:
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


def _first_tensor_cut(file: Path) -> str | None:
    """Return the first tensor a cut-short .safetensors file lacks a part of, None if unknown."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length_bytes = stream.read(8)
        if len(length_bytes) < 8:
            return None
        (length,) = struct.unpack("<Q", length_bytes)
        if length > size - 8:
            return None
        try:
            table = json.loads(stream.read(length))
            ends = {n: v["data_offsets"][1] for n, v in table.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None  # the header itself is damaged: the caller says so
    cut = [name for name, end in ends.items() if end > size - 8 - length]
    return min(cut, key=ends.__getitem__) if cut else None


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
    def of(cls, reader: CheckpointReader, name: str) -> "StoredTensor":
        """Return the named tensor of the reader's checkpoint."""
        header = reader.headers[name]
        return cls(header.dtype, header.shape, lambda: reader.read(name))

    @classmethod
    def copy_of(cls, reader: CheckpointReader, name: str) -> "StoredTensor":
        """Return the same values as a private copy, never a view of the mapped file."""
        header = reader.headers[name]
        return cls(header.dtype, header.shape, lambda: reader.read(name).clone())

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Say whether the values are floats, as Tensor.is_floating_point does."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Read the tensor and return the part that index selects; `[...]` for all of it."""
        return self._read()[index]


def same_values(headers: dict[str, TensorHeader], first: str, second: str) -> bool:
    """Say whether two tensors are stored and equal; both are mapped for as long as that takes."""
    left, right = headers.get(first), headers.get(second)
    if left is None or right is None or left[1:] != right[1:]:  # dtype and shape
        return False
    return torch.equal(
        CheckpointReader(headers).read(first), CheckpointReader(headers).read(second)
    )


def shorten(names: list[str]) -> str:
    """List a few names and count the rest.

    >>> shorten(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - NUM_NAMES_SHOWN
    shown = ", ".join(names[:NUM_NAMES_SHOWN])
    return f"{shown} and {rest} more" if rest > 0 else shown
