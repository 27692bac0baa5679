"""Counts operators, bytes moved, bytes allocated and their peak on fake CUDA tensors.

Bytes moved assume that a kernel reads and writes every operand once; matrix products are counted
separately, because they are compute-bound. Bytes allocated are those of PyTorch's allocator, in
blocks of 512, without library workspaces.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_device import Launch

BLOCK_BYTES = 512  # c10's kMinBlockSize
# Matrix products: aten's, and this project's kernels.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matvec", "matmul", "matmul_transposed"}
# These access only as much of their first tensor as they return or are given.
READS_PART = {"embedding", "index", "index_select", "gather"}
WRITES_PART = {"index_put", "index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce"}
FILLS = {"fill", "zero", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}
FILLS |= {"ones", "ones_like", "new_ones", "arange", "scalar_tensor"}
# These launch no kernel, like views.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SILENT |= {"lift_fresh", "_reshape_alias", "_unsafe_view"}
COPIES = {"_to_copy", "copy"}
# On a GPU these reject mixed float dtypes; some accept them on fake tensors.
ONE_DTYPE = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_efficient_attention"}
ONE_DTYPE |= {"native_layer_norm", "index_copy", "index_add", "index_put", "scatter_add"}


class Tracker(TorchDispatchMode):
    """Counts inside its block, within a `benchmarks.fake_device.FakeCuda`."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0  # bytes
        self.peak_operator = ""  # operator that reached the peak
        self.operators: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # bytes, by operator
        self.mixed: list[str] = []  # operators with tensors on two devices
        self._blocks: dict[int, int] = {}

    @property
    def moved_outside_products(self) -> int:
        """Bytes moved, without matrix products."""
        return sum(count for name, count in self.moved.items() if name not in PRODUCTS)

    def start_step(self) -> None:
        """Reset operators and bytes moved; allocations stay counted."""
        self.operators.clear()
        self.moved.clear()
        self.peak = self.allocated

    def adopt(self, tensors: Iterable[Tensor], operator: str = "") -> None:
        """Count the memory of tensors, each storage once, until it is freed."""
        for tensor in tensors:
            if _device_type(tensor) == "cuda":
                self._add(tensor.untyped_storage(), operator)

    def _add(self, storage: torch.UntypedStorage, operator: str) -> None:
        key = storage._cdata
        if key in self._blocks:
            return
        self._blocks[key] = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self.allocated += self._blocks[key]
        if self.allocated > self.peak:
            self.peak, self.peak_operator = self.allocated, operator
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.allocated -= self._blocks.pop(key)

    def launch(self, launch: Launch) -> None:
        """Count a kernel of this project (called by `FakeCuda`)."""
        self._count(launch.name.removesuffix("_kernel"), [*launch.read, *launch.written])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and count one operator; the project's own are counted as on CUDA."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a property
            return func(*args, **kwargs)
        if func.namespace == "ptuning":
            on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            with self:
                return func.redispatch(on_cuda, *args, **kwargs)
        output = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        returned = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.adopt(returned, str(func))
        if "cuda" not in map(_device_type, given + returned):
            return output
        name = func._schema.name.removeprefix("aten::")
        plain = name.rstrip("_")
        dtypes = {tensor.dtype for tensor in given if tensor.is_floating_point()}
        if plain in ONE_DTYPE and len(dtypes) > 1:
            raise RuntimeError(f"{func} takes one dtype and got {sorted(map(str, dtypes))}")
        if plain not in COPIES and any(_is_elsewhere(tensor) for tensor in given):
            self.mixed.append(f"{func}: {[(_device_type(x), tuple(x.shape)) for x in given]}")
        if not (func.is_view or name in SILENT):
            changed = _changed(func, args, kwargs)
            self._count(plain, _touched(plain, given, changed, returned))
        return output

    def _count(self, name: str, touched: Sequence[Tensor]) -> None:
        self.operators[name] += 1
        self.moved[name] += sum(map(_bytes_of, touched))


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator changes in place, by its schema."""
    parameters = func._schema.arguments
    given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)}
    given |= kwargs
    changed = [
        given.get(parameter.name)
        for parameter in parameters
        if parameter.alias_info is not None and parameter.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _touched(
    name: str, given: Sequence[Tensor], changed: Sequence[Tensor], returned: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tensors read or written; one that is both appears twice."""
    own = {id(tensor) for tensor in given}
    written = [*changed, *(tensor for tensor in returned if id(tensor) not in own)]
    if name in FILLS:
        return written
    if name in READS_PART:
        return [*given[1:], *written, *written]
    if name in WRITES_PART and changed:
        return [*given[1:], given[-1]]
    return [*given, *written]


def _device_type(tensor: Tensor) -> str:
    return tensor.device.type if isinstance(tensor, FakeTensor) else ""


def _is_elsewhere(tensor: Tensor) -> bool:
    return _device_type(tensor) not in ("cuda", "") and tensor.dim() > 0


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded dimension counts once."""
    count = 1
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if step else 1
    return count * tensor.element_size()
