"""Device functions on tiles: rows in and out, mirrors, powers, positions, and products that keep fp32's precision.

A tile is (tokens, channels). Pairs (2j, 2j+1) are reached by splitting a tile in registers: every row is read once, in
whole sectors. Two rules of products with a state follow from compilers' documented faults:

* The state is held transposed, (dv, dk), so that no accumulator is ever transposed into a product.
* Several products that add into a running state start from zero and are added as one term: chained into the running
  state they were mis-pipelined on Blackwell before Triton 3.9. The plain sum is also the more exact one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter computes bf16 arithmetic and products wrongly and truncates when it rounds to bf16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(
    base: tl.tensor, stride: tl.tensor, rows: tl.tensor, valid: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Rows of a matrix with unit last stride as (tokens, BLOCK), zero where not valid: bf16 as stored, else fp32."""
    columns = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if WIDTH < BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    # 64-bit row offsets: a tensor may hold more than 2^31 elements.
    tile = tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    if INTERPRETED or tile.dtype != tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    base: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    tile: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a tile (tokens, BLOCK) to rows."""
    columns = tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, rounded(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def store_columns(
    base: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    tile: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a transposed tile (BLOCK, tokens) to rows."""
    columns = tl.arange(0, BLOCK)
    mask = valid[None, :] & (columns < WIDTH)[:, None]
    pointers = base + rows.to(tl.int64)[None, :] * stride + columns[:, None]
    tl.store(pointers, rounded(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_vector(base: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """WIDTH contiguous numbers, padded with zeros."""
    columns = tl.arange(0, BLOCK)
    return tl.load(base + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def store_vector(base: tl.tensor, x: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """The inverse of `load_vector`."""
    columns = tl.arange(0, BLOCK)
    tl.store(base + columns, x, mask=columns < WIDTH)


@triton.jit
def placed(program: tl.tensor, H: tl.tensor, parts: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Image and head (64-bit) and part of a program: neighbours share the rows of one image, as memory does."""
    return (program // (H * parts)).to(tl.int64), (program % H).to(tl.int64), (program // H) % parts


@triton.jit
def load_mirror(
    cos: tl.tensor, sin: tl.tensor, offset: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The tables of one head, (BLOCK,) each; zeros, never used, in place of None."""
    if cos is None:
        head_cos = tl.zeros((BLOCK,), tl.float32)
        head_sin = head_cos
    else:
        head_cos = load_vector(cos + offset, WIDTH, BLOCK)
        head_sin = load_vector(sin + offset, WIDTH, BLOCK)
    return head_cos, head_sin


@triton.jit
def load_rope(
    cos: tl.tensor, sin: tl.tensor, rows: tl.tensor, valid: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The tables (tokens, WIDTH) of some rows, (tokens, BLOCK) each; zeros, never used, in place of None."""
    if cos is None:
        row_cos = tl.zeros((rows.shape[0], BLOCK), tl.float32)
        row_sin = row_cos
    else:
        row_cos = load_rows(cos, WIDTH, rows, valid, WIDTH, BLOCK)
        row_sin = load_rows(sin, WIDTH, rows, valid, WIDTH, BLOCK)
    return row_cos, row_sin


@triton.jit
def pairs(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(T, D) to its even and odd columns, (T, D/2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def interleaved(even: tl.tensor, odd: tl.tensor) -> tl.tensor:
    """The inverse of `pairs`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def turned(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROPE: tl.constexpr) -> tl.tensor:
    """Rotate every pair if ROPE; tables (T, D/2)."""
    if ROPE:
        a, b = pairs(x)
        x = interleaved(cos * a - sin * b, sin * a + cos * b)
    return x


@triton.jit
def turned_back(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROPE: tl.constexpr) -> tl.tensor:
    """The inverse, and transpose, of `turned`."""
    if ROPE:
        a, b = pairs(x)
        x = interleaved(cos * a + sin * b, cos * b - sin * a)
    return x


@triton.jit
def reflected(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, MIRROR: tl.constexpr) -> tl.tensor:
    """Reflect every pair if MIRROR; tables (D/2,). Its own inverse and transpose."""
    if MIRROR:
        a, b = pairs(x)
        x = interleaved(-(cos[None, :] * a + sin[None, :] * b), cos[None, :] * b - sin[None, :] * a)
    return x


@triton.jit
def rectified(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, MIRROR: tl.constexpr) -> tl.tensor:
    """ReLU(mirror(x)) in fp32; a NaN stays a NaN."""
    y = reflected(x.to(tl.float32), cos, sin, MIRROR)
    return tl.where(y <= 0.0, 0.0, y)


@triton.jit
def raised(r: tl.tensor, power: tl.tensor, POWER: tl.constexpr) -> tl.tensor:
    """r^power of non-negative numbers; POWER spells out 1, 2 and 3, 0 stands for any other."""
    phi = r
    if POWER == 2:
        phi = r * r
    elif POWER == 3:
        phi = r * r * r
    elif POWER == 0:
        phi = tl.where(r <= 0.0, 0.0, tl.exp2(power * tl.log2(tl.where(r <= 0.0, 1.0, r))))
    return phi


@triton.jit
def through_map(grad: tl.tensor, r: tl.tensor, power: tl.tensor, POWER: tl.constexpr) -> tl.tensor:
    """The gradient of relu(y)^power turned into that of y, given r = relu(y): zero at zero."""
    if POWER == 2:
        grad = grad * 2.0 * r
    elif POWER == 3:
        grad = grad * 3.0 * r * r
    elif POWER == 0:
        grad = grad * power * tl.exp2((power - 1.0) * tl.log2(tl.where(r > 0.0, r, 1.0)))
    return tl.where(r > 0.0, grad, 0.0)  # selects: a masked key's r is 0, its grad may be anything


@triton.jit
def mirror_gradient(x: tl.tensor, grad: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Gradients of the mirror's cos and sin, (D/2,) each, from a tile before it and the gradient after it."""
    a, b = pairs(x.to(tl.float32))
    grad_a, grad_b = pairs(grad)
    return tl.sum(b * grad_b - a * grad_a, 0), -tl.sum(b * grad_a + a * grad_b, 0)


@triton.jit
def split(x: tl.tensor, PARTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The operand of a product as the sum of 1, 2 or 3 bf16 parts: 8, 16 or 24 bits of it. Others repeat the first."""
    high = rounded(x, tl.bfloat16)
    middle, low = high, high
    if PARTS > 1:
        rest = x.to(tl.float32) - high.to(tl.float32)
        middle = rounded(rest, tl.bfloat16)
        low = middle
        if PARTS > 2:
            low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
    return operand(high), operand(middle), operand(low)


@triton.jit
def operand(x: tl.tensor) -> tl.tensor:
    """A bf16 tile as products take it: in the interpreter, as fp32."""
    return x.to(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def transposed(x: tl.tensor, middle: tl.tensor, low: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """All parts of an operand, transposed."""
    return tl.trans(x), tl.trans(middle), tl.trans(low)


@triton.jit
def product(
    a: tl.tensor,
    a_middle: tl.tensor,
    a_low: tl.tensor,
    b: tl.tensor,
    b_middle: tl.tensor,
    b_low: tl.tensor,
    A: tl.constexpr,
    B: tl.constexpr,
) -> tl.tensor:
    """The product of two operands of A and B parts, smallest terms first, without those below the smallest part."""
    out = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if A == 3:
        out = tl.dot(a_low, b, out)
    if B == 3:
        out = tl.dot(a, b_low, out)
    if A == 3 and B == 3:
        out = tl.dot(a_middle, b_middle, out)
    if A > 1:
        out = tl.dot(a_middle, b, out)
    if B > 1:
        out = tl.dot(a, b_middle, out)
    return tl.dot(a, b, out)


@triton.jit
def key_count(mask: tl.tensor, image: tl.tensor, M: tl.tensor) -> tl.tensor:
    """Number of unmasked keys of the image whose row starts at `image`, at least 1, as fp32."""
    count = M
    if mask is not None:
        counts = tl.zeros((2048,), tl.int32)
        for start in range(0, M, 2048):
            rows = start + tl.arange(0, 2048)
            counts += tl.load(mask + image + rows, mask=rows < M, other=0).to(tl.int32)
        count = tl.sum(counts)
    return tl.maximum(count, 1).to(tl.float32)
