"""Tensors that are read when they are wanted, so that a checkpoint is never held twice.

Files are mapped, not read: a tensor that is used in its stored dtype shares the file's pages; one
that is converted or moved to a GPU is copied, and the mapping is given back soon after. One reader
serves the whole checkpoint and keeps one mapping at a time.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptuning.model.checkpoint_files import TensorHeader, map_bin, open_safetensors

# Pages of a mapping stay in memory until it is dropped, so it is renewed after this many bytes.
REMAP_BYTES = 64 * 2**20
# Smaller tensors are copied: a norm or a bias would keep the mapping of its whole file alive.
COPY_BYTES = 2**20


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
                self._map(header.file)
            self._handed_out_bytes += header.num_bytes
            assert self._get is not None, "a file is mapped above"
            value = self._get(name)
            return value.clone() if header.num_bytes < COPY_BYTES else value

    def _map(self, file: Path) -> None:
        self.close()
        if file.suffix == ".safetensors":
            self._get = open_safetensors(file).get_tensor
        else:
            self._get = map_bin(file).__getitem__
        self._file = file

    def close(self) -> None:
        """Drop the current mapping; tensors already handed out stay valid."""
        self._get = self._file = None
        self._handed_out_bytes = 0


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


class SharedResult:
    """Computes a pair of tensors once, a quantised weight and its scales; hands each out once."""

    def __init__(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._halves: dict[int, Tensor] = {}

    def take(self, half: int) -> Tensor:
        """Return half 0 or 1; the other half is kept until it is taken."""
        with self._lock:
            if half not in self._halves:
                self._halves = dict(enumerate(self._compute()))
            return self._halves.pop(half)


def same_values(headers: dict[str, TensorHeader], first: str, second: str) -> bool:
    """Say whether two stored tensors are equal; both are mapped for as long as that takes."""
    left, right = headers[first], headers[second]
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(
        CheckpointReader(headers).read(first), CheckpointReader(headers).read(second)
    )
