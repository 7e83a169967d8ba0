"""Shared by the kernels' tests: inputs, the quadratic oracle, the errors, and the list of cases."""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mirrorla.kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# RMS of the rounding to the output's dtype; the kernels may add 5 % to it forward.
ROUNDING = {"fp32": 2.6e-8, "bf16": 1.65e-3, "fp16": 2.07e-4}

# Bounds of RMS(x - x64) / RMS(x64). Gradients: 2e-3 bf16 and 1e-5 fp32 are the design's; fp16 has three bits more than
# bf16, so an eighth. Forward fp32: as for gradients. What the kernels return in fp32 (state, tables' gradients) is not
# rounded: products of two bf16 parts leave out 2^-18 of each term and round at 2^-17.
FORWARD = {"fp32": 1e-6, "bf16": 1.05, "fp16": 1.05}
GRADIENT = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2.5e-4}
UNROUNDED = {"fp32": 1e-5, "bf16": 2e-5, "fp16": 2e-5}


@dataclass(frozen=True)
class Case:
    """One call; the defaults are the plain path."""

    regime: str = "head"
    dtype: str = "fp32"
    B: int = 2
    N: int = 33
    M: int = 33
    H: int = 2
    dk: int = 16
    dv: int = 16
    mirror: int = 0  # images of the tables: 0 none, 1 shared, B one each
    rope: bool = False
    mask: str = ""  # "", "some" (with inf and nan in masked rows) or "image" (one image has no key at all)
    power: float = 1.0
    packed: bool = False
    zero_rows: bool = False
    scale: float = 1.0
    expanded_grad: bool = False

    @property
    def name(self):
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Case(), k) or k in ("regime", "dtype")}
        return "-".join(v if isinstance(v, str) else f"{k}{v}" for k, v in changed.items())


def make(case, device="cpu"):
    """Inputs of a case: q, k, v, grad_out, mirror tables, rotary tables, mask; the same numbers on every device."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    dtype = DTYPES[case.dtype]
    B, N, M, H, dk, dv = case.B, case.N, case.M, case.H, case.dk, case.dv

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * case.scale).to(dtype)

    if case.packed:  # views of one projection, as the attention layer cuts them
        q, k, v, _ = normal(B, N, 4, H, dk).unbind(2)
    else:
        q, k, v = normal(B, N, H, dk), normal(B, M, H, dk), normal(B, M, H, dv)
    if case.zero_rows:  # phi is zero there: nothing but eps divides
        q[:, ::3] = -q[:, ::3].abs()
        k[:, ::2] = 0
    grad = torch.randn(B, N, H, dv, generator=generator).to(dtype)
    if case.expanded_grad:
        grad = grad[:1, :1, :1, :1].expand(B, N, H, dv)
    mirror = rope_q = rope_k = (None, None)
    if case.mirror:
        angle = torch.rand(case.mirror, H, dk // 2, generator=generator) * 6
        mirror = (angle.cos(), angle.sin())
    if case.rope:
        angle_q, angle_k = (torch.rand(n, dk // 2, generator=generator) * 6 for n in (N, M))
        rope_q, rope_k = (angle_q.cos(), angle_q.sin()), (angle_k.cos(), angle_k.sin())
    mask = None
    if case.mask:
        mask = torch.rand(B, M, generator=generator) > 0.4
        mask[0] = mask[0] & (case.mask != "image")
        k, v = k.clone(), v.clone()
        k[~mask], v[~mask] = float("nan"), float("inf")
    tables = [tuple(None if x is None else x.to(device) for x in pair) for pair in (mirror, rope_q, rope_k)]
    # A copy to a device packs what was strided or expanded: the layouts are tested where they are made.
    return *(x.to(device) for x in (q, k, v, grad)), *tables, None if mask is None else mask.to(device)


def _double(tables):
    return None if tables[0] is None else tuple(x.double() for x in tables)


def quadratic(q, k, v, mirror, q_rope, k_rope, mask, power, eps):
    """The O(N·M) definition, pair arithmetic spelled out and no state formed."""

    def turn(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2)

    def phi(x):
        if mirror is not None:
            cos, sin = (table[:, None] for table in mirror)
            a, b = x[..., 0::2], x[..., 1::2]
            x = torch.stack((-(cos * a + sin * b), cos * b - sin * a), -1).flatten(-2)
        return x.clamp(min=0) ** power

    keep = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    k, v = (torch.where(keep[:, :, None, None], x, 0.0) for x in (k, v))
    phi_q, phi_k = phi(q), phi(k)
    plain = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    roped = plain
    if q_rope is not None:
        roped_q, roped_k = (turn(x, *(t[:, None] for t in r)) for x, r in ((phi_q, q_rope), (phi_k, k_rope)))
        roped = torch.einsum("bnhd,bmhd->bhnm", roped_q, roped_k)
    weight = keep[:, None, None, :] / keep.sum(1).clamp(min=1)[:, None, None, None]
    denominator = (plain * weight).sum(-1, keepdim=True) + eps
    return torch.einsum("bhnm,bmhe->bnhe", roped * weight / denominator, v)


def expected(case, oracle):
    """Output and gradients in float64 by "twin" or "quadratic"."""
    q, k, v, grad, mirror, rope_q, rope_k, mask = make(case)
    leaves = [x.double().requires_grad_() for x in (q, k, v, *(t for t in mirror if t is not None))]
    tables = tuple(leaves[3:]) or None
    if oracle == "quadratic":
        out = quadratic(*leaves[:3], tables, _double(rope_q), _double(rope_k), mask, case.power, 1e-6)
    else:
        clean = leaves[:3]
        if mask is not None:  # the twin's gradient of a masked nan is nan; what it would be multiplied with is zero
            clean = [leaves[0], *(torch.where(mask[:, :, None, None], x, 0.0) for x in leaves[1:3])]
        out = reference.mirror_linear_attention(
            *clean,
            mirror=tables,
            q_rope=_double(rope_q),
            k_rope=_double(rope_k),
            mask=mask,
            power=case.power,
        )
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


def run_worker(mode, folder, names):
    """What the kernels give for some cases, from Triton's interpreter in a process of its own."""
    result = folder / "results.pt"
    worker = Path(__file__).with_name("kernel_worker.py")
    root = str(worker.parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(worker), mode, str(result), *names]
    done = subprocess.run(command, env=environment, cwd=root, timeout=3600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(result)


def error(actual, wanted):
    """RMS(actual - wanted) / RMS(wanted); the plain RMS where all that is wanted is zero."""
    size = wanted.square().mean().sqrt()
    return ((actual.double() - wanted).square().mean().sqrt() / (size if size > 0 else 1.0)).item()


def floor(wanted, dtype):
    """The error that rounding to the output's dtype alone makes."""
    return error(wanted.to(DTYPES[dtype]), wanted)


def check(case, oracle, out, *grads):
    """Compare what the kernels gave with an oracle, within the bounds at the head of the file."""
    wanted_out, wanted = expected(case, oracle)
    assert out.shape == wanted_out.shape
    out, wanted_out = in_range(f"output of {case.name}", out, wanted_out)
    assert error(out, wanted_out) <= output_limit(case, wanted_out), case.name
    assert len(grads) == len(wanted)
    for name, grad, exact in zip(("dq", "dk", "dv", "dcos", "dsin"), grads, wanted, strict=False):
        assert grad.shape == exact.shape
        grad, exact = in_range(f"{name} of {case.name}", grad, exact)
        assert error(grad, exact) <= gradient_limit(case, name, exact), f"{name} of {case.name}"


def in_range(name, found, exact):
    """What the dtype can hold of both; beyond it (fp16 ends at 65504) infinity of the right sign was found."""
    beyond = exact.to(found.dtype).isinf()
    assert torch.equal(found[beyond], exact[beyond].to(found.dtype)), f"{name} overflows"
    assert torch.isfinite(found[~beyond]).all(), name
    return found[~beyond], exact[~beyond]


def output_limit(case, exact):
    """The bound of the output's error.

    A power is 2^(p log2 x), whose exponent, up to 16 p for x from 2^-16 on, is rounded at 2^-24 of itself: one token
    alone does not average that.
    """
    if case.dtype != "fp32":
        return FORWARD[case.dtype] * floor(exact, case.dtype)
    alone = case.power != 1 and min(case.N, case.M) == 1
    return max(FORWARD["fp32"], 16 * case.power * 2**-24 if alone else 0.0)


def gradient_limit(case, name, exact):
    """The bound of a gradient's error.

    Never below what rounding the exact result makes. One key or one query alone is not averaged: there the tables'
    gradients are differences of like terms, for which the design's bound stands, and an operand below 2^-12 keeps
    twelve bits in two parts of fp16, whose smallest step is 2^-24.
    """
    alone = min(case.N, case.M) == 1
    if name not in ("dq", "dk", "dv"):
        return (GRADIENT if alone else UNROUNDED)[case.dtype]
    rounding = floor(exact, case.dtype)
    if alone and case.dtype == "fp16":
        return max(GRADIENT["fp16"], rounding + 2**-12)
    return max(GRADIENT[case.dtype], 1.05 * rounding)


def _cases():
    """The default cases: every regime, type and option at least once, every width, awkward sizes.

    A single key comes with positions: without them y = v, and the gradient of q is rounding's.
    """
    everything = {"N": 49, "M": 70, "dk": 24, "dv": 40, "mirror": 2, "rope": True, "mask": "some"}
    for regime in ("chip", "head", "split"):
        for dtype in DTYPES:
            yield Case(regime, dtype, B=1, N=70, M=70)
            yield Case(regime, dtype, **everything)
        yield Case(regime, "fp32", B=1, H=3, N=1, M=1, rope=True)
        yield Case(regime, "fp32", B=1, N=15, M=197, dv=8, mirror=1, rope=True)
        yield Case(regime, "fp32", B=3, H=1, mask="image", mirror=3)
        yield Case(regime, "fp32", packed=True, zero_rows=True, expanded_grad=True)
        yield Case(regime, "bf16", packed=True, B=1, N=49, M=49, dk=32, dv=32)
    for power in (1.5, 2.0, 3.0):
        yield Case("head", "fp32", B=1, power=power)
        yield Case("split", "bf16", B=1, power=power, mirror=1)
    for d, other in ((8, 128), (32, 48), (48, 16), (64, 64), (72, 8), (80, 96), (96, 80), (128, 24)):
        yield Case("chip" if d % 3 else "head", "fp32", B=1, H=1, dk=d, dv=other, rope=True)
    yield Case("head", "bf16", B=1, H=1, dk=64, dv=64, N=130, M=65)
    yield Case("head", "bf16", B=1, H=1, dk=128, dv=128, N=65, M=65, mirror=1, rope=True)
    for dtype in DTYPES:
        yield Case("head", dtype, B=1, scale=1e4, mirror=1)
        yield Case("split", dtype, B=1, H=1, scale=1e-4, N=197, M=197)
    yield Case("chip", "fp32", H=1, scale=1e4, power=3.0)
    yield Case("chip", "bf16", H=1, scale=1e4, power=3.0, mirror=2)


def _slow():
    """The full grid."""
    for regime in ("chip", "head", "split"):
        for dtype in DTYPES:
            for d in (8, 16, 24, 32, 48, 64, 72, 80, 96, 128):
                for full in (False, True):
                    extra = {"mirror": 2, "rope": True, "mask": "some"} if full else {}
                    yield Case(regime, dtype, N=49, M=197, dk=d, dv=d, H=1, **extra)
                    yield Case(regime, dtype, N=15, M=1, dk=d, dv=136 - d, H=3, **(extra | {"rope": True}))
            for N, M in ((1, 196), (196, 15), (784, 784), (1, 1)):
                for mirror in (0, 1, 2):
                    for power in (1.0, 2.5):
                        yield Case(regime, dtype, N=N, M=M, mirror=mirror, power=power, rope=N == M)
    yield Case("head", "bf16", B=1, H=1, N=3136, M=3136, dk=32, dv=32)
    yield Case("split", "bf16", B=1, H=1, N=16384, M=16384)
    yield Case("split", "fp32", B=1, H=1, N=16384, M=16384)


PARTS = {
    case.name: case
    for case in (
        Case("split", "fp32", B=1, N=70, M=150, dk=24, dv=40, mirror=1, rope=True, mask="some"),
        Case("split", "bf16", B=1, N=150, M=70),
    )
}
CASES = {case.name: case for case in _cases()}
SLOW = {case.name: case for case in _slow()}
