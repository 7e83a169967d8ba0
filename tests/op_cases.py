"""Shared by the operator's tests: calls, what they give, and how close that must be."""

import torch

from mirrorla.positions import rope_tables

# Rounding of fp32 sums of up to 64 products, relative to the whole tensor; bf16 keeps 8 bits of every result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8}


def case(B=2, N=7, M=9, H=3, dk=8, dv=6, dtype=torch.float32, mirror="images", rope=True, mask=True, seed=0):
    """q, k, v as views of one packed tensor, and the options of `mirror_linear_attention`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    packed = draw(B, max(N, M), H * (2 * dk + dv) + 2)  # as a projection: tokens far apart, rows not aligned
    q, k, v = packed[..., :-2].split((H * dk, H * dk, H * dv), dim=-1)
    q, k, v = q[:, :N].unflatten(-1, (H, dk)), k[:, :M].unflatten(-1, (H, dk)), v[:, :M].unflatten(-1, (H, dv))
    options = {}
    if mirror:
        wide = torch.promote_types(dtype, torch.float32)
        angle = 3 * torch.rand(1 if mirror == "one" else B, H, dk // 2, generator=generator, dtype=wide)
        options["mirror"] = (angle.cos(), angle.sin())
    if rope:
        options |= {"q_rope": rope_tables(1, N, dk), "k_rope": rope_tables(1, M, dk)}
    if mask:
        options["mask"] = torch.rand(B, M, generator=generator) < 0.7
    return (q, k, v), options


def results(function, tensors, options, seed=1):
    """Output and gradients of q, k, v and the mirrors, by name."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    mirror = [x.detach().clone().requires_grad_() for x in options.get("mirror", ())]
    out = function(*tensors, **{**options, **({"mirror": tuple(mirror)} if mirror else {})})
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.bfloat16().to(out.dtype)  # the same numbers in every dtype
    grads = torch.autograd.grad(out, [*tensors, *mirror], weight)
    return dict(zip(["out", "q", "k", "v", "cos", "sin"], [out.detach(), *grads], strict=False))


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape, name
        error = (found[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"
