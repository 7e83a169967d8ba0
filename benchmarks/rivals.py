"""What is measured: our operator in its variants, and everything else that computes linear or softmax attention.

Every function takes q (B, N, H, dk), k (B, M, H, dk) and v (B, M, H, dv), as a projection leaves them in memory, and
returns (B, N, H, dv): what a rival needs copied or transposed is part of its time.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mirrorla import MirrorAttention
from mirrorla.kernels import reference
from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.positions import rope_tables

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
CPU_SDPA = ("sdpa flash", "sdpa math")


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: as in the tables.
        B: images.
        N: queries.
        M: keys.
        H: heads.
        d: channels of a head, of keys and of values.
    """

    name: str
    B: int
    N: int
    M: int
    H: int
    d: int

    def floor_bytes(self, direction: str, itemsize: int) -> int:
        """Bytes that must be moved: q, k, v and out; backward q, k, v and dO, and their gradients' writes."""
        queries, keys = self.B * self.N * self.H * self.d, self.B * self.M * self.H * self.d
        forward, backward = 2 * queries + 2 * keys, 3 * queries + 4 * keys
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction] * itemsize


CASES = {
    "cuda": (
        *(Case(f"S{i + 1}", 128, n, n, h, 32) for i, (h, n) in enumerate(((3, 3136), (6, 784), (12, 196), (24, 49)))),
        Case("HR", 1, 65536, 65536, 16, 64),
        *(Case(f"PVT{i + 1}", 128, n, 49, h, 64) for i, (h, n) in enumerate(((1, 3136), (2, 784), (5, 196)))),
        *(Case(f"Sana B{b} N{n}", b, n, n, 70, 32) for b in (1, 4, 16) for n in (1024, 4096)),
    ),
    "cpu": (
        Case("S1", 1, 3136, 3136, 3, 32),
        Case("S3", 8, 196, 196, 12, 32),
        Case("HR", 1, 16384, 16384, 1, 64),
        Case("PVT1", 2, 3136, 49, 1, 64),
        Case("Sana", 1, 1024, 1024, 70, 32),
    ),
}


@dataclass(frozen=True)
class Rival:
    """An implementation and what it should compute.

    Attributes:
        attend: q, k, v -> out.
        exact: the same in float64.
        tables: what else is differentiated.
        ours: whether a wrong result ends the run.
        quadratic: whether its float64 twin holds N x M scores, and so is asked for few tokens only.
    """

    attend: Attend
    exact: Attend
    tables: tuple[Tensor, ...] = ()
    ours: bool = False
    quadratic: bool = False


@dataclass(frozen=True)
class LayerRival:
    """A whole layer with its projections, gate and positions.

    Attributes:
        run: x (B, N, C) -> (B, N, C).
        parameters: what is differentiated beside x.
    """

    run: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]


def kernels(case: Case, device: torch.device) -> dict[str, Rival]:
    """The implementations by name.

    Args:
        case: the shape; mirrors and positions are made for it.
        device: of the tensors.
    """
    angle = 3 * torch.rand(case.B, case.H, case.d // 2, device=device)
    mirror = angle.cos().requires_grad_(), angle.sin().requires_grad_()
    q_rope, k_rope = rope_tables(1, case.N, case.d, device), rope_tables(1, case.M, case.d, device)
    full: dict[str, Any] = {"mirror": mirror, "q_rope": q_rope, "k_rope": k_rope}
    plain = reference.mirror_linear_attention
    found = {
        "mirrorla": Rival(mirror_linear_attention, plain, ours=True),
        "mirrorla mirror": _ours({"mirror": mirror}),
        "mirrorla mirror rope": _ours(full),
        "reference": Rival(plain, plain),
        "reference mirror rope": Rival(partial(plain, **full), partial(plain, **full), mirror),
    }
    if device.type == "cuda":
        torch.compiler.reset()  # after eight shapes of one function it would run uncompiled without a word
        found["reference compiled"] = Rival(torch.compile(plain, dynamic=False), plain)
        if importlib.util.find_spec("flash_bla") is not None:
            found["flash-bidirectional"] = Rival(_flash_bidirectional, plain)
    for name in SDPA if device.type == "cuda" else CPU_SDPA:
        found[name] = Rival(partial(_softmax, SDPA[name]), partial(_softmax, SDPBackend.MATH), quadratic=True)
    return found


def layers(case: Case, device: torch.device) -> dict[str, LayerRival]:
    """The whole layers by implementation.

    Args:
        case: the shape, N = M.
        device: of the tensors.
    """
    torch.manual_seed(0)
    grid = squarest_grid(case.N)
    mirror, softmax = (MirrorAttention(case.H * case.d, case.H, kind=kind).to(device) for kind in ("mirror", "softmax"))
    found = {"mirrorla": _layer(mirror, grid), "reference": _layer(mirror, grid, _reference_inside)}
    if device.type == "cuda":
        torch.compiler.reset()
        found["mirrorla compiled"] = _layer(_compiled(mirror), grid)
        found["reference compiled"] = _layer(_compiled(_twin(mirror)), grid, _reference_inside)
    for name in SDPA if device.type == "cuda" else CPU_SDPA:
        found[name] = _layer(softmax, grid, partial(sdpa_kernel, SDPA[name]))
    return found


def squarest_grid(tokens: int) -> tuple[int, int]:
    """The squarest grid with exactly this many cells."""
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return height, tokens // height


def _ours(options: dict[str, Any]) -> Rival:
    exact = partial(reference.mirror_linear_attention, **options)
    return Rival(partial(mirror_linear_attention, **options), exact, options["mirror"], ours=True)


def _layer(
    layer: torch.nn.Module, grid: tuple[int, int], inside: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> LayerRival:
    def run(x: Tensor) -> Tensor:
        with inside():
            out: Tensor = layer(x, grid)
        return out

    return LayerRival(run, tuple(layer.parameters()))


def _compiled(layer: torch.nn.Module) -> torch.nn.Module:
    return cast(torch.nn.Module, torch.compile(layer))


def _twin(layer: MirrorAttention) -> MirrorAttention:
    """The same weights in a module of its own, which torch.compile then knows apart."""
    twin = MirrorAttention(layer.dim, layer.num_heads).to(layer.proj.weight.device)
    twin.load_state_dict(layer.state_dict())
    return twin


def _reference_inside() -> AbstractContextManager[Any]:
    return mock.patch("mirrorla.attention.mirror_linear_attention", reference.mirror_linear_attention)


def _softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _flash_bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = importlib.import_module("flash_bla.ops.linear_attn.fused").linear_attention
    out: Tensor = attend(q.relu().transpose(1, 2), k.relu().transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return out
