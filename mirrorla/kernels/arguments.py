"""What the op accepts: one line that names the argument, its shape and what is expected.

Shapes: B images, N queries, M keys, H heads, dk and dv channels, J = dk/2 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirrorla.kernels.reference import Tables


def check_keys(
    k: Tensor, v: Tensor, mirror: Tables | None, rope: Tables | None, mask: Tensor | None, power: float
) -> None:
    """Hold keys and values, and what belongs to them, to their shapes.

    Raises:
        ValueError: for the first argument that does not fit.
    """
    _check_rows("k", k, "(B, M, H, dk)")
    _check_rows("v", v, "(B, M, H, dv)")
    if v.shape[:3] != k.shape[:3]:
        B, M, H, _ = k.shape
        raise ValueError(f"v must be ({B}, {M}, {H}, dv), as k has images, keys and heads; got {tuple(v.shape)}")
    _check_alike("v", v, "k", k)
    _check_map("k", k, mirror, rope, power)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2] or mask.device != k.device):
        raise ValueError(
            f"mask must be bool {tuple(k.shape[:2])} on {k.device}, True for keys that count; "
            f"got {_name(mask)} {tuple(mask.shape)} on {mask.device}"
        )


def check_queries(q: Tensor, mirror: Tables | None, rope: Tables | None, power: float, eps: float) -> None:
    """Hold queries, and what belongs to them, to their shapes.

    Raises:
        ValueError: for the first argument that does not fit.
    """
    _check_rows("q", q, "(B, N, H, dk)")
    _check_map("q", q, mirror, rope, power)
    if not eps >= 0:
        raise ValueError(f"eps {eps} must be 0 or more, for example 1e-6")


def check_pair(q: Tensor, k: Tensor, q_rope: Tables | None, k_rope: Tables | None) -> None:
    """Hold queries and keys to each other.

    Raises:
        ValueError: they differ in images, heads or channels, or only one of them has positions.
    """
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        B, _, H, dk = q.shape
        raise ValueError(f"k must be ({B}, M, {H}, {dk}), as q has images, heads and channels; got {tuple(k.shape)}")
    _check_alike("k", k, "q", q)
    if (q_rope is None) != (k_rope is None):
        missing = "q_rope" if q_rope is None else "k_rope"
        raise ValueError(f"{missing} is missing: positions need the tables of both queries and keys, or of neither")


def check_shares(q: Tensor, v: Tensor, mirrors: Sequence[Tables], rope: Tables | None, power: float) -> None:
    """Hold the queries' mirrors, one for each share of the values, to both.

    Raises:
        ValueError: for the first argument that does not fit.
    """
    if not mirrors or v.shape[-1] % len(mirrors):
        raise ValueError(
            f"query_mirrors are {len(mirrors)}, no divisor of the {v.shape[-1]} channels of v: give a divisor"
        )
    for mirror in mirrors:
        _check_map("q", q, mirror, rope, power)


def check_state(q: Tensor, S: Tensor, s: Tensor) -> None:
    """Hold a state to the queries that read it.

    Raises:
        ValueError: another shape, dtype or device.
    """
    B, _, H, dk = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, x, shape, expected in (
        ("S", S, (B, H, dk), f"({B}, {H}, {dk}, dv)"),
        ("s", s, (B, H, dk), f"({B}, {H}, {dk})"),
    ):
        if x.ndim != (4 if name == "S" else 3) or x.shape[:3] != shape:
            raise ValueError(f"{name} must be {expected} for queries {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != wide or x.device != q.device:
            raise ValueError(
                f"{name} must be {str(wide).removeprefix('torch.')} on {q.device}, got {_name(x)} on {x.device}"
            )


def _check_rows(name: str, x: Tensor, expected: str) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {_name(x)} {tuple(x.shape)}")


def _check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise ValueError(
            f"{name} is {_name(x)} and {other} is {_name(y)}: cast them to one dtype, or use torch.autocast"
        )
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} and {other} on {y.device}: move them to one device")


def _check_map(name: str, x: Tensor, mirror: Tables | None, rope: Tables | None, power: float) -> None:
    B, N, H, d = x.shape
    if d % 2 or d < 2:
        raise ValueError(f"{name} {tuple(x.shape)} has {d} channels: maps act on pairs, choose an even number >= 2")
    if not power >= 1.0:
        raise ValueError(f"power {power} is below 1: choose 1 (the plain map) or more")
    for table in mirror or ():
        if table.ndim != 3 or table.shape[0] not in (1, B) or table.shape[1:] != (H, d // 2):
            raise ValueError(
                f"mirror tables must be ({B} or 1, {H}, {d // 2}) for {name} {tuple(x.shape)}, got {tuple(table.shape)}"
            )
    for table in rope or ():
        if table.ndim != 2 or table.shape[0] != N or table.shape[1] != d // 2:
            raise ValueError(
                f"{name}_rope tables must be ({N}, {d // 2}) for {name} {tuple(x.shape)}, got {tuple(table.shape)}"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}_rope tables {tuple(table.shape)} require a gradient, which they have none: detach them"
            )
    for table in (*(mirror or ()), *(rope or ())):
        if table.device != x.device:
            raise ValueError(f"a table of shape {tuple(table.shape)} is on {table.device} and {name} on {x.device}")


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
