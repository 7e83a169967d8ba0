"""The gate before every timing of attention: output and gradients against the float64 reference, on the same device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.rivals import Attend, Case, Rival, kernels

GATE_VALUES = 2**27
"""Values of one tensor in the float64 gate: 1 GiB, and autograd keeps a few dozen of them."""

GATE_TOKENS = 1024
"""Most tokens for which softmax attention is held to float64."""

# RMS error over RMS of float64: (output beyond rounding it, gradients). A rival only has to be recognisably right.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.05, 2e-3)}
RIVALS_BOUND = 3e-2


class Verdict(NamedTuple):
    """Whether an implementation is right, whether it is ours, and its errors or why it does not run."""

    right: bool
    ours: bool
    text: str


def gate(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Verdict]:
    """Hold every implementation to the float64 reference, output and gradients.

    Args:
        case: the shape; fewer images where float64 would not fit.
        device: where both run.
        dtype: of the implementation's tensors.

    Returns:
        A verdict for each implementation.
    """
    images = max(1, min(case.B, GATE_VALUES // (max(case.N, case.M) * case.H * case.d)))
    fewer = replace(case, B=images)
    shorter = replace(case, B=min(case.B, 2), N=min(case.N, GATE_TOKENS), M=min(case.M, GATE_TOKENS))
    return {
        name: _verdict(rival, shorter if rival.quadratic else fewer, device, dtype)
        for name, rival in kernels(fewer, device).items()
    }


def _verdict(rival: Rival, case: Case, device: torch.device, dtype: torch.dtype) -> Verdict:
    inputs, weight = draw(case, device, dtype)
    try:
        found = values(rival.attend, inputs, rival.tables, weight)
    except (RuntimeError, NotImplementedError) as error:
        return Verdict(False, rival.ours, f"does not run: {str(error).splitlines()[0][:120]}")
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = values(rival.exact, doubles, rival.tables, weight.double())
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    rounding = _error(exact[0].to(dtype), exact[0])
    first, rest = BOUNDS[dtype]
    if not rival.ours:
        first, rest = RIVALS_BOUND, RIVALS_BOUND
    elif dtype != torch.float32:
        first *= rounding
    text = f"output {errors[0]:.1e} (bound {first:.1e}), gradients {max(errors[1:]):.1e} (bound {rest:.1e})"
    return Verdict(errors[0] <= first and max(errors[1:]) <= rest, rival.ours, text)


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Draw q, k and v, views of packed projections and each a leaf of autograd, and the gradient of the output.

    Args:
        case: the shape.
        device: of the tensors.
        dtype: of the tensors.
    """

    def packed(tokens: int, parts: int) -> list[Tensor]:
        projection = torch.randn(case.B, tokens, parts * case.H * case.d, device=device, dtype=dtype)
        return [x.unflatten(-1, (case.H, case.d)).requires_grad_() for x in projection.chunk(parts, dim=-1)]

    q, k, v = packed(case.N, 4)[:3] if case.N == case.M else (packed(case.N, 2)[0], *packed(case.M, 2))
    return [q, k, v], torch.randn(q.shape, device=device, dtype=dtype)


def values(attend: Attend, inputs: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of inputs and tables.

    Args:
        attend: q, k, v -> out.
        inputs: q, k and v.
        tables: what else is differentiated.
        weight: gradient of the output.
    """
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [*inputs, *tables], weight)]


def _error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt())
