"""The Triton kernel that rotates queries and keys: each number is read and written once.

Plain operations move seven times as many bytes, as each reads and writes float32 copies.
`ptuning.model.rotary` imports it at the first launch.
Shapes: H heads, D width of a head.
"""

# Kernel parameters take Triton's own annotations or none.
# mypy: disable-error-code="no-untyped-def"

from ptuning.model.quantization.triton_backend import constexpr, jit, tl


@jit
def rotate_kernel(
    heads, cos, sin, rotated, sign, num_heads, WIDTH: constexpr, BLOCK_H: constexpr,
    BLOCK_D: constexpr,
):  # fmt: skip
    """Write BLOCK_H heads of one token; WIDTH is D, BLOCK_D the next power of two."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    is_first = (columns // (WIDTH // 4)) % 2 == 0  # quarter of its half
    partners = tl.where(is_first, columns + WIDTH // 4, columns - WIDTH // 4)
    angle_cos = tl.load(cos + token * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    angle_sin = tl.load(sin + token * WIDTH + columns, mask=columns < WIDTH, other=0.0) * sign
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (head[:, None] < num_heads) & (columns[None, :] < WIDTH)
    rows = ((token * num_heads + head) * 3 * WIDTH)[:, None]
    for part in tl.static_range(2):  # queries, keys
        first = rows + part * WIDTH
        own = tl.load(heads + first + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(heads + first + partners[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = own * angle_cos[None, :] + other * angle_sin[None, :]
        tl.store(
            rotated + first + columns[None, :], turned.to(rotated.dtype.element_ty), mask=inside
        )
    values = rows + 2 * WIDTH + columns[None, :]
    tl.store(rotated + values, tl.load(heads + values, mask=inside, other=0.0), mask=inside)
