"""A CUDA device without a GPU: tensors with shape, dtype and device `cuda:0`, but no memory.

PyTorch's fake tensors propagate shapes through operators. A build without CUDA lacks three things
that a training step needs; `FakeCuda` supplies them while it is active:
- autograd asks the device for streams: it gets the no-op device guard of `meta`, and during a
  backward pass the engine is told that tensors are on `meta`, which has no streams;
- fused attention selects its kernel by GPU: here it is the memory-efficient one;
- Triton launches kernels: a launch is reported to `on_launch`, and the kernel is not run.
No compiler, driver or Triton is needed. Operators, bytes and peaks equal those of the real engine
behind a compiled device guard, except for two more scalar copies per step.
Source: https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

import ast
import ctypes
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ptuning.model import rotary_triton
from ptuning.model.quantization import torch_backend, triton_backend
from ptuning.model.quantization.backends import pick_backend
from ptuning.model.quantization.triton_backend import TritonBackend

DEVICE = torch.device("cuda", 0)
META = torch.device("meta")
CAPABILITY = (9, 0)  # of an H100
MEMORY_BYTES = 80 * 2**30
# Row strides, in elements, that the memory-efficient kernel accepts; it copies any other mask at
# every call: preprocess_mask in aten/src/ATen/native/transformers/attention.cpp
MASK_ALIGNMENT = 8
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
CACHED = (  # cached functions of a device
    pick_backend,
    rotary_triton.can_rotate,
    triton_backend.capability,
    torch_backend.total_memory,
)


class Launch(NamedTuple):
    """A kernel launch that a GPU would have received."""

    kernel: Any  # as Triton compiles it; without Triton the plain function
    arguments: dict[str, Any]  # by parameter, constants included
    options: dict[str, int]  # num_warps and the like, where given

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(plain_function(self.kernel).__name__)

    @property
    def read(self) -> list[Tensor]:
        """Tensors that it reads."""
        return [tensor for name, tensor in self._tensors if name not in self._stored]

    @property
    def written(self) -> list[Tensor]:
        """Tensors that it writes."""
        return [tensor for name, tensor in self._tensors if name in self._stored]

    @property
    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(k, value) for k, value in self.arguments.items() if isinstance(value, Tensor)]

    @property
    def _stored(self) -> frozenset[str]:
        return stored_parameters(plain_function(self.kernel))


OnLaunch = Callable[[Launch], None]


class FakeCuda(FakeTensorMode):
    """Turns every tensor created inside into a fake one, and makes `cuda:0` available.

    Give devices with their index: `.to("cuda")` asks the device guard for one and gets `meta`.
    """

    def __init__(self, on_launch: OnLaunch) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._on_launch = on_launch
        self._in_engine = False
        self._exits: list[ExitStack] = []

    def __enter__(self) -> Self:
        """Install the fake device."""
        with ExitStack() as stack:
            stack.enter_context(no_op_guard())
            stack.enter_context(self._engine_on_this_thread())
            stack.enter_context(_one_gpu())
            stack.enter_context(_kernels_replaced(self._on_launch))
            super().__enter__()
            stack.push(super().__exit__)
            stack.enter_context(_Functions(self))
            self._exits.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        """Restore the previous state."""
        self._exits.pop().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run one operator; the engine is told `meta`, and its allocations are on `cuda:0`."""
        if self._in_engine and func is torch.ops.prim.device.default:
            return META
        if kwargs and kwargs.get("device") == META:
            kwargs = {**kwargs, "device": DEVICE}
        with self.engine(False), torch._C.DisableTorchFunction():
            return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def _engine_on_this_thread(self) -> Iterator[None]:
        """Keep autograd off device threads, which a build without CUDA lacks."""
        run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def run_here(*args: Any, **kwargs: Any) -> Any:
            with (
                self.engine(True),
                _Functions(self),
                torch.autograd.set_multithreading_enabled(False),
            ):
                return run(*args, **kwargs)

        with mock.patch("torch.autograd._engine_run_backward", run_here):  # all backward passes
            yield

    @contextmanager
    def engine(self, is_asking: bool) -> Iterator[None]:
        """Return whether C++ asks for the device from the engine, rather than from an operator that
        Python called, such as dropout, which selects its kernel by device.
        """
        before, self._in_engine = self._in_engine, is_asking
        try:
            yield
        finally:
            self._in_engine = before


class _Functions(TorchFunctionMode):
    """Intercepts torch's functions as Python calls them."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func; attention runs as its memory-efficient kernel."""
        if func is functional.scaled_dot_product_attention:
            func = efficient_attention
        if isinstance(func, torch._ops.OpOverload):  # from a dispatch mode, perhaps for the engine
            return func(*args, **(kwargs or {}))
        with self._device.engine(False):
            return func(*args, **(kwargs or {}))


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Return scaled_dot_product_attention by the memory-efficient kernel.

    ValueError where a GPU would take a slower way: by cuDNN, or with a copy of the mask.
    """
    if torch.backends.cuda.cudnn_sdp_enabled():
        raise ValueError("cuDNN is not excluded, which plans attention anew for every shape.")
    if attn_mask is not None:
        strides = attn_mask.stride()
        if strides[-1] != 1 or any(stride % MASK_ALIGNMENT for stride in strides[:-1]):
            raise ValueError(
                f"the mask has the strides {strides}, so that the kernel copies it at every call; "
                f"pad its rows to a multiple of {MASK_ALIGNMENT} elements."
            )
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    wants_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    output: Tensor = run(query, key, value, attn_mask, wants_gradient)[0]
    return output


@contextmanager
def no_op_guard() -> Iterator[None]:
    """Give `cuda` the device guard of `meta` where PyTorch has none for it.

    OSError where the table of guards is not found: its symbol is that of Linux and macOS.
    """
    libraries = [str(path) for path in Path(torch.__file__).parent.glob("lib/libc10.*")]
    try:
        table = ctypes.c_void_p * len(DeviceType.__members__)
        guards = table.in_dll(ctypes.CDLL(libraries[0]), GUARDS)
    except (IndexError, ValueError) as error:
        raise OSError(
            f"no {GUARDS} in {libraries}: PyTorch has changed, or this is Windows"
        ) from error
    cuda, meta = DeviceType.CUDA.value, DeviceType.Meta.value
    before = guards[cuda]
    if before is None:
        guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def _one_gpu() -> Iterator[None]:
    """Answer the project's queries about the GPU, and clear cached answers afterwards."""
    properties = SimpleNamespace(total_memory=MEMORY_BYTES)
    with (
        mock.patch.object(torch.cuda, "device", nullcontext),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(TritonBackend, "unavailable_reason", return_value=None),
    ):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    for function in CACHED:
        function.cache_clear()


class _Kernel:
    """Replaces a Triton kernel: `kernel[grid](...)` reports the launch."""

    def __init__(self, kernel: Any, on_launch: OnLaunch) -> None:
        self._kernel, self._on_launch = kernel, on_launch
        self._signature = inspect.signature(plain_function(kernel))

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        parameters = self._signature.parameters
        options = {name: value for name, value in kwargs.items() if name not in parameters}
        own = {name: value for name, value in kwargs.items() if name in parameters}
        arguments = self._signature.bind(*args, **own).arguments
        self._on_launch(Launch(self._kernel, arguments, options))


def plain_function(kernel: Any) -> Callable[..., Any]:
    """Return the function that triton.jit wrapped, or the kernel itself without Triton."""
    function: Callable[..., Any] = getattr(kernel, "fn", kernel)
    return function


@cache
def stored_parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    """Return the parameters of a Triton kernel that it stores to: `tl.store(name + ...)`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel)))
    targets = [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store"
    ]
    names = {_leftmost(target) for target in targets}
    return frozenset(names & set(inspect.signature(kernel).parameters))


def _leftmost(node: ast.expr) -> str:
    while isinstance(node, ast.BinOp):
        node = node.left
    return ast.unparse(node)


@contextmanager
def _kernels_replaced(on_launch: OnLaunch) -> Iterator[None]:
    """Replace every Triton kernel in the project's modules."""
    with ExitStack() as stack:
        for module in (triton_backend, rotary_triton):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel") and not isinstance(kernel, _Kernel):
                    replacement = _Kernel(kernel, on_launch)
                    stack.enter_context(mock.patch.object(module, name, replacement))
        yield
