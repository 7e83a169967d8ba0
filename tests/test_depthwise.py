"""The depthwise convolution of wide kernels against torch's own, and where it is used."""

import pytest
import torch
from torch.nn import functional as F

from mirrorla import depthwise
from mirrorla.depthwise import depthwise_conv
from mirrorla.layers import ResidualDepthwise


def leaves(B, h, w, C, k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(B, h, w, 3 * C, dtype=dtype, generator=generator)
    x = packed[..., C : 2 * C].detach().requires_grad_()  # strided, as a part of a projection
    weight, bias = (torch.randn(*s, dtype=dtype, generator=generator).requires_grad_() for s in ((C, 1, k, k), (C,)))
    return x, weight, bias


def torchs_own(x, weight, bias):
    k, C = weight.shape[-1], weight.shape[0]
    return F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)


@pytest.mark.parametrize("strip", [1, 60, 100, 2**20], ids=["row", "rows", "image", "whole"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 5), (2, 7, 5, 3, 5), (1, 2, 9, 4, 9), (3, 12, 3, 1, 7), (0, 3, 3, 2, 5)], ids=str
)
def test_output_and_gradients_are_torchs(shape, strip, monkeypatch):
    monkeypatch.setattr(depthwise, "STRIP", strip)
    inputs = leaves(*shape)
    found, expected = depthwise_conv(*inputs), torchs_own(*inputs)
    assert type(found.grad_fn).__name__ == "_WideDepthwiseBackward"
    weight = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_only_what_is_wanted_is_differentiated():
    x, weight, bias = leaves(1, 4, 4, 2, 5)
    (grad,) = torch.autograd.grad(depthwise_conv(x.detach(), weight, bias.detach()).sum(), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(torchs_own(x, weight, bias).sum(), weight)[0])
    depthwise_conv(x, weight.detach(), None).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_second_derivatives_agree_with_finite_differences():
    assert torch.autograd.gradgradcheck(depthwise_conv, leaves(1, 3, 4, 2, 5))


def test_small_kernels_autocast_and_other_code_take_torchs_convolution():
    assert "Permute" in type(depthwise_conv(*leaves(1, 4, 4, 2, 3, torch.float32)).grad_fn).__name__
    inputs = leaves(1, 4, 4, 2, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv(*inputs)
    assert out.dtype == torch.bfloat16 and "Permute" in type(out.grad_fn).__name__
    assert not depthwise._runs_as_it_stands(torch.empty(1, device="meta"))


def test_one_image_is_convolved_with_channels_last():
    x, weight, bias = leaves(1, 8, 8, 4, 5, torch.float32)
    assert depthwise_conv(x, weight, bias).stride()[1:] == (32, 4, 1)


def test_the_residual_is_part_of_the_kernel():
    conv = ResidualDepthwise(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = (x, conv.weight, conv.bias)
    expected = x + F.conv2d(x, conv.weight, conv.bias, padding=1, groups=3)
    torch.testing.assert_close(conv(x), expected)
    for found, wanted in zip(
        torch.autograd.grad(conv(x).square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
