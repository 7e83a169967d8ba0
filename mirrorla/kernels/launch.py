"""From tensors to kernel arguments, and the ordered sum over parts that forward and backward share.

Arguments of kernels go by name; a tensor x of rows (B, N, H, d) is passed with its strides x_b, x_n and x_h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirrorla.kernels import tiles
from mirrorla.kernels.mapping import key_count

Arguments = dict[str, Any]

STATE = torch.float32

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 numbers whose sum holds a number of this dtype."""

FUSION: Arguments = {"enable_fp_fusion": True}  # said aloud: Triton 3.9 warns that its default will change


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on a tensor's device; every result and every workspace comes from here."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device; an H200's in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rows(name: str, x: Tensor) -> Arguments:
    """A tensor (B, N, H, d) of unit last stride with its strides."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} of shape {tuple(x.shape)} has last stride {x.stride(-1)}: the kernels read stride 1")
    return {name: x, f"{name}_b": x.stride(0), f"{name}_n": x.stride(1), f"{name}_h": x.stride(2)}


def mirror_tables(cos: Tensor | None, sin: Tensor | None) -> Arguments:
    """Mirror tables (B or 1, H, J); a copy only where they are not contiguous fp32."""
    if cos is None or sin is None:
        return {"mirror_cos": None, "mirror_sin": None, "mirror_b": 0}
    step = cos.shape[1] * cos.shape[2] if cos.shape[0] > 1 else 0
    return {"mirror_cos": cos.float().contiguous(), "mirror_sin": sin.float().contiguous(), "mirror_b": step}


def rope_tables(name: str, cos: Tensor | None, sin: Tensor | None) -> Arguments:
    """Rotary tables (tokens, J); a copy only where they are not contiguous fp32."""
    if cos is None or sin is None:
        return {f"{name}_cos": None, f"{name}_sin": None}
    return {f"{name}_cos": cos.float().contiguous(), f"{name}_sin": sin.float().contiguous()}


def key_mask(mask: Tensor | None) -> Arguments:
    """A bool mask (B, M), seen as bytes."""
    if mask is None:
        return {"mask": None, "mask_b": 0}
    mask = mask if mask.stride(1) == 1 else mask.contiguous()
    return {"mask": mask.view(torch.uint8), "mask_b": mask.stride(0)}


def readable(x: Tensor) -> Tensor:
    """The tensor itself if its last stride is 1, else a copy: gradients of sums arrive expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


class MirrorGradients:
    """Partial gradients of the mirror's tables: every program of a pass writes its own, one torch sum adds them."""

    def __init__(self, table: Tensor | None, images: int, parts: int) -> None:
        self.table = table
        self.parts = parts
        if table is not None:
            _, H, J = table.shape
            self.buffer = empty(2, images, H, parts, J, like=table, dtype=STATE)

    def arguments(self, first_part: int) -> Arguments:
        """Where a pass of several parts writes."""
        if self.table is None:
            return {"grad_cos": None, "grad_sin": None}
        buffer = self.buffer[:, :, :, first_part:]
        return {"grad_cos": buffer[0], "grad_sin": buffer[1]}

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the tables' shape; no work where a head has one part and every image its table."""
        if self.table is None:
            return None, None
        total = self.buffer.sum(3) if self.parts > 1 else self.buffer.squeeze(3)
        if self.table.shape[0] < total.shape[1]:
            total = total.sum(1, keepdim=True)
        return total[0], total[1]


def exponent(power: float) -> Arguments:
    """The map's power; 1, 2 and 3 are compiled in."""
    return {"power": float(power), "POWER": int(power) if power in (1, 2, 3) else 0}


def arch(device: torch.device) -> int:
    """Major compute capability; a Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def tile_of(op: tiles.Op, x: Tensor, dv: int, *extras: Tensor | None, power: float) -> tiles.Tile:
    """The shipped tile for q or k (…, dk) on its device, given the mirror's and the rotary tables, or None each."""
    plain = power == 1.0 and all(table is None for table in extras)
    return tiles.tile(op, x.dtype, x.shape[-1], dv, arch(x.device), plain=plain)


def sizes(tile: tiles.Tile, dtype: torch.dtype, dk: int, dv: int) -> Arguments:
    """What is compiled in."""
    widths = {"DK": dk, "DV": dv, "BLOCK_DK": tiles.padded(dk), "BLOCK_DV": min(tiles.padded(dv), tile.values)}
    cut = {"BLOCK": tile.tokens, "num_warps": tile.warps, "num_stages": tile.stages}
    return {**widths, **cut, "PARTS": PARTS[dtype], **FUSION}


class Cut(NamedTuple):
    """How a split pass is laid out."""

    tile: tiles.Tile
    chunk: int
    """Tokens of a part."""
    parts: int

    def arguments(self, H: int) -> Arguments:
        """For a kernel over H heads."""
        return {"H": H, "parts": self.parts, "chunk": self.chunk}


def cut(tile: tiles.Tile, x: Tensor, dv: int, *, leaves_state: bool) -> Cut:
    """Cut the tokens of q or k (B, tokens, H, dk)."""
    B, tokens, H, dk = x.shape
    chunk = tiles.part_tokens(B * H, tokens, (dk * dv + dk) * leaves_state, tile.tokens)
    return Cut(tile, chunk, max(triton.cdiv(tokens, chunk), 1))


def sum_parts(states: Tensor, means: Tensor, mask: Tensor | None, M: int, scaled: bool) -> tuple[Tensor, Tensor]:
    """Add the states of parts in order.

    Args:
        states: (B, H, parts, dk, dv) fp32.
        means: (B, H, parts, dk) fp32.
        mask: True for the keys that count (B, M).
        M: keys.
        scaled: whether the sums are divided by the number of keys.

    Returns:
        (B, H, dk, dv) and (B, H, dk).
    """
    B, H, parts, dk, dv = states.shape
    if parts == 1:  # the pass has scaled its only part
        return states[:, :, 0], means[:, :, 0]
    state, mean = empty(B, H, dk, dv, like=states), empty(B, H, dk, like=means)
    grid = (B * H * triton.cdiv(dk * dv + dk, 256),)
    sum_parts_kernel[grid](
        **{"states": states, "means": means, "state": state, "mean": mean, **key_mask(mask), "M": M, "H": H},
        **{"parts": parts, "DK": dk, "DV": dv, "SCALED": scaled, "BLOCK": 256, "num_warps": 4, **FUSION},
    )
    return state, mean


@triton.jit(do_not_specialize=["mask_b", "M", "H", "parts"])
def sum_parts_kernel(
    states: tl.tensor,
    means: tl.tensor,
    state: tl.tensor,
    mean: tl.tensor,
    mask: tl.tensor,
    mask_b: tl.tensor,
    M: tl.tensor,
    H: tl.tensor,
    parts: tl.tensor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums BLOCK numbers of one head, 16 parts at a time."""
    BLOCKS: tl.constexpr = (DK * DV + DK + BLOCK - 1) // BLOCK
    head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    element = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    in_state, in_mean = element < DK * DV, (element >= DK * DV) & (element < DK * DV + DK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, 16):
        part = first + tl.arange(0, 16)
        index = (head * parts + part)[:, None]
        valid = (part < parts)[:, None]
        total += tl.sum(
            tl.load(states + index * (DK * DV) + element[None, :], mask=valid & in_state[None, :], other=0.0)
            + tl.load(means + index * DK + (element - DK * DV)[None, :], mask=valid & in_mean[None, :], other=0.0),
            0,
        )
    if SCALED:
        total = total / key_count(mask, head // H * mask_b, M)
    tl.store(state + head * (DK * DV) + element, total, mask=in_state)
    tl.store(mean + head * DK + element - DK * DV, total, mask=in_mean)
