"""The Triton kernels as machine code for sm_80 and sm_90, compiled without a GPU: no register is spilled, tensor cores are used.

What is compiled are the kernels that the back end launches on a fake device, with its tiles.
"""

import platform
import re
import subprocess
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.fake_device import DEVICE, FakeCuda, Launch
from ptuning.model.quantization.backends import get_backend
from ptuning.model.quantization.reference import packed_columns
from ptuning.model.quantization.torch_backend import MAX_FUSED_ROWS
from ptuning.model.rotary_triton import launch_rotate

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="Triton brings its assembler for Linux on x86-64",
    ),
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POINTERS = {
    torch.int8: "*i8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
# Rows of activations on both sides of each bound, and widths from the nano model's to ChatGLM-6B's.
ROWS = (1, 5, 17, 33, 65, 129, MAX_FUSED_ROWS, MAX_FUSED_ROWS + 1)
WIDTHS = (192, 768, 2048, 4096, 8192, 12288, 16384)
# Triton compiles a variant for sizes that are multiples and pointers that are aligned to as many bytes.
DIVISOR = 16
FUSED = ("matmul_kernel", "matmul_transposed_kernel")
KERNELS = ("matvec_kernel", *FUSED, "dequantize_kernel", "rotate_kernel")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile again, and leave nothing in the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@cache
def launches() -> dict[str, Launch]:
    """Return one launch for each kernel, its dtypes, constants and options, by these in words."""
    found: dict[str, Launch] = {}

    def keep(launch: Launch) -> None:
        found.setdefault(describe(launch), launch)

    backend = get_backend("triton")
    with FakeCuda(keep):
        for dtype in DTYPES:
            for num_rows, width, bits in product(ROWS, WIDTHS, (4, 8)):
                x = torch.empty(num_rows, width, dtype=dtype, device=DEVICE)
                packed = torch.empty(
                    width, packed_columns(width, bits), dtype=torch.int8, device=DEVICE
                )
                scale = torch.empty(width, dtype=torch.float16, device=DEVICE)
                backend.matmul(x, packed, scale, bits)
                backend.matmul_transposed(x, packed, scale, bits)
            heads = torch.empty(1, 7, 32, 3, 128, dtype=dtype, device=DEVICE)
            angles = torch.empty(1, 7, 128, device=DEVICE)
            launch_rotate(heads, angles, angles, 1.0)
    return found


def is_constant(launch: Launch, name: str) -> bool:
    (parameter,) = (parameter for parameter in launch.kernel.params if parameter.name == name)
    return parameter.is_constexpr


def describe(launch: Launch) -> str:
    words = [launch.name]
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            words.append(f"{name}={str(value.dtype).removeprefix('torch.')}")
        elif is_constant(launch, name):
            words.append(f"{name}={value}")
    return " ".join(words + [f"{name}={value}" for name, value in launch.options.items()])


def compile_for(capability: int, launch: Launch) -> bytes:
    """Return a launch's kernel as machine code, specialised as Triton would for this launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        divides = isinstance(value, Tensor) or (isinstance(value, int) and value % DIVISOR == 0)
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if divides and not parameter.do_not_specialize:
            attributes[index,] = [["tt.divisibility", DIVISOR]]
    source = triton.compiler.ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, warp_size=32)
    cubin: bytes = triton.compile(source, target=target, options=launch.options).asm["cubin"]
    return cubin


def cuobjdump(cubin: bytes, flag: str, folder: Path) -> str:
    """Return what the tool says that Triton brings."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_tile_compiles_spills_nothing_and_takes_tensor_cores(
    capability: int, name: str, tmp_path: Path
) -> None:
    own = {words: launch for words, launch in launches().items() if launch.name == name}
    assert own
    faults = []
    for words, launch in own.items():
        cubin = compile_for(capability, launch)
        usage = cuobjdump(cubin, "--dump-resource-usage", tmp_path)
        memory = re.findall(rf"Function {name}:\s+REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage)
        if memory != [("0", "0")]:
            faults.append(f"{words}: {usage}")
        if name in FUSED:
            products = set(re.findall(r"\bHG?MMA\b", cuobjdump(cubin, "-sass", tmp_path)))
            # A warp group multiplies 64 rows at once; fewer are left to single warps.
            is_wide = capability == 90 and launch.arguments["BLOCK_M"] >= 64
            if products != {"HGMMA" if is_wide else "HMMA"}:
                faults.append(f"{words}: {products or 'no tensor cores'}")
    assert not faults


def test_the_back_end_launches_every_kernel_and_these_tiles() -> None:
    names = [launch.name for launch in launches().values()]
    assert set(names) == set(KERNELS)
    for name in FUSED:  # 4 heights x 3 widths, in int4 and int8 and two types
        assert names.count(name) == 4 * 3 * 4
