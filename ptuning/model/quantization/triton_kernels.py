"""Triton kernels that dequantise a packed weight inside the product, so no float copy is stored.

Codes become the reference's weights in registers: code x scale in float16, then the activations'
dtype. Sums are float32, offsets 64-bit. Sizes are arguments: Triton specialises them on being
multiples of 16, which vector loads need, and compiles one kernel for all weight shapes; `num_rows`,
which changes with every batch, is not even specialised on that. Imported by `triton_backend` only;
without Triton the functions stay plain Python that is never called, so that tools which import
every module (the doctest run) can read this one too.
Shapes: M rows of activations (`num_rows`), num_out x num_in the weight, `width` bytes in a row of
its codes; BLOCK_M x BLOCK_N (x BLOCK_K) one program's tile.
"""

# Kernel parameters take Triton's own annotations or none.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # TritonBackend.unavailable_reason says so and what to install
    triton = tl = constexpr = None


def jit(function: Any) -> Any:
    """Hand a kernel to Triton, where it is installed."""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["num_rows"])


@jit
def load_weight(
    packed, scale, rows, first, num_out, width, stride, BITS: constexpr, BLOCK_K: constexpr
):  # fmt: skip
    """Return float16 weights (len(rows), BLOCK_K) of the columns from `first` on; 0 outside.

    `stride` is the distance in bytes between consecutive rows of codes.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    columns = first // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    inside = (rows[:, None] < num_out) & (columns[None, :] < width)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    codes = tl.load(packed + offsets, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        # High nibble: even column. The shifts of a signed 32-bit integer keep the nibble's sign.
        codes = tl.interleave(codes >> 4, (codes << 28) >> 28)
    row_scale = tl.load(scale + rows, mask=rows < num_out, other=0.0)
    return codes.to(tl.float16) * row_scale[:, None]


@jit
def matmul_kernel(
    x, packed, scale, product, num_rows, num_out, width,
    BITS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write x (M, num_in) times the transposed weight, a BLOCK_M x BLOCK_N tile per program."""
    num_in = width * (8 // BITS)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, num_in, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < num_rows) & (inputs[None, :] < num_in)
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * num_in + inputs[None, :], mask=inside, other=0.0
        )
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        weight = tl.trans(weight.to(tile.dtype))  # (BLOCK_K, BLOCK_N)
        total = tl.dot(tile, weight, total)
    inside = (rows[:, None] < num_rows) & (outputs[None, :] < num_out)
    offsets = rows.to(tl.int64)[:, None] * num_out + outputs[None, :]
    tl.store(product + offsets, total.to(product.dtype.element_ty), mask=inside)


@jit
def matmul_transposed_kernel(
    grad, packed, scale, product, num_rows, num_out, width,
    BITS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write grad (M, num_out) times the weight, a BLOCK_M x BLOCK_K tile per program."""
    num_in = width * (8 // BITS)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    inputs = first + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first_out in range(0, num_out, BLOCK_N):
        outputs = first_out + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < num_rows) & (outputs[None, :] < num_out)
        tile = tl.load(
            grad + rows.to(tl.int64)[:, None] * num_out + outputs[None, :], mask=inside, other=0.0
        )
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        total = tl.dot(tile, weight.to(tile.dtype), total)
    inside = (rows[:, None] < num_rows) & (inputs[None, :] < num_in)
    offsets = rows.to(tl.int64)[:, None] * num_in + inputs[None, :]
    tl.store(product + offsets, total.to(product.dtype.element_ty), mask=inside)


@jit
def matvec_kernel(
    x, packed, scale, product, num_out, width,
    BITS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write x (M, num_in) times the transposed weight for a few rows, one row per program.

    No tensor cores: a row of x gives them nothing to share, and reading the weight is the cost.
    """
    num_in = width * (8 // BITS)
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, num_in, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        values = tl.load(x + row * num_in + inputs, mask=inputs < num_in, other=0.0).to(tl.float32)
        weight = load_weight(packed, scale, outputs, first, num_out, width, width, BITS, BLOCK_K)
        total += weight.to(tl.float32) * values[None, :]
    result = tl.sum(total, axis=1).to(product.dtype.element_ty)
    tl.store(product + row * num_out + outputs, result, mask=outputs < num_out)


@jit
def dequantize_kernel(
    packed, scale, weight, num_rows, width, stride,
    BITS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """Write the float weight (num_rows, num_in), one BLOCK_N x BLOCK_K tile per program."""
    num_in = width * (8 // BITS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    inputs = first + tl.arange(0, BLOCK_K)
    values = load_weight(packed, scale, outputs, first, num_rows, width, stride, BITS, BLOCK_K)
    inside = (outputs[:, None] < num_rows) & (inputs[None, :] < num_in)
    tl.store(
        weight + outputs.to(tl.int64)[:, None] * num_in + inputs[None, :],
        values.to(weight.dtype.element_ty),
        mask=inside,
    )
