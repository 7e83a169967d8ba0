"""Run by the kernels' tests in a process of its own: Triton's interpreter must be on before Triton is imported.

    python kernel_worker.py whole|steps RESULT NAME…

Writes what the kernels returned for each case; every buffer they take is full of NaN first.
"""

import sys

import torch

from mirrorla.kernels import backward, forward, launch, tiles
from tests.kernel_cases import CASES, PARTS, SLOW, make


def poisoned(*shape, like, dtype=None):
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


def attend(case, device="cpu"):
    """Output, then the gradients."""
    q, k, v, grad, mirror, rope_q, rope_k, mask = make(case, device)
    tables = (*mirror, *rope_q, *rope_k, mask, case.power, 1e-6)
    out, S, s = forward.forward(q, k, v, *tables)
    assert (S.numel() == 0) == (case.regime == "chip") == (s.numel() == 0)
    assert out.dtype == q.dtype and out.is_contiguous()
    grads = backward.backward(grad, q, k, v, S, s, *tables)
    assert all(x.dtype == q.dtype and x.is_contiguous() for x in grads[:3])
    return [out, *(x for x in grads if x is not None)]


def in_steps(case):
    """The same by state and apply and their backward passes."""
    q, k, v, grad, mirror, rope_q, rope_k, mask = make(case)
    S, s = forward.state(k, v, *mirror, *rope_k, mask, case.power)
    out = forward.apply(q, S, s, *mirror, *rope_q, case.power, 1e-6)
    dq, dS, ds, *of_q = backward.apply_backward(grad, q, S, s, *mirror, *rope_q, case.power, 1e-6)
    dk, dv, *of_k = backward.state_backward(dS, ds, k, v, *mirror, *rope_k, mask, case.power)
    assert (mirror[0] is None) == (of_q[0] is None) == (of_k[1] is None)
    tables = [a + b for a, b in zip(of_q, of_k, strict=True)] if case.mirror else []
    return [out, dq, dk, dv, *tables]


def main(mode, result, names):
    assert type(launch.key_count).__name__ == "InterpretedFunction", "TRITON_INTERPRET=1 came too late"
    launch.empty = poisoned
    tiles.regime = lambda *shape: regime
    results = {}
    for name in names:
        case = (CASES | SLOW | PARTS)[name]
        regime = case.regime
        tiles.PART_TOKENS = 32  # several parts at small sizes
        if mode == "steps":
            for tiles.PART_TOKENS in (16, 64, 10**6):
                results[f"{name}/{tiles.PART_TOKENS}"] = in_steps(case)
            continue
        results[name] = attend(case)
        if case.mirror and case.mask:
            again = attend(case)
            assert all(torch.equal(a, b) for a, b in zip(results[name], again, strict=True)), (
                f"{name} is not repeatable"
            )
    torch.save(results, result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
