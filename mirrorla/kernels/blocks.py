"""One block of tokens at a time: the feature map, its rotation and their derivatives, in buffers used again and again.

Shapes: B images, N tokens, H heads, d channels, J = d/2 blocks of two; b images and n tokens of the block at hand.
Channel pairs are taken as complex numbers, one vectorised pass instead of eight strided ones: a rotation is a product
with cos + i sin, the reflection y0 = -(cos x0 + sin x1), y1 = cos x1 - sin x0 the conjugate times -(cos + i sin).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Values of a block, 2 MiB in fp32: small enough to stay in cache, large enough for the cost of a call. An eighth of it
# took up to 2.5 times as long on two threads, twice of it up to 1.3 times.
CPU_BLOCK = 2**19
# On a GPU launches cost more than cache misses; this bounds every buffer to 64 MiB.
GPU_BLOCK = 2**24


def blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N, H, d) into slices of images and tokens: several whole images, or part of one.

    Args:
        x: the tensor to walk over.
    """
    B, N, H, d = x.shape
    limit = CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK
    tokens = max(1, min(N, limit // (H * d)))
    images = max(1, limit // (H * d * tokens)) if tokens == N else 1
    for first_image in range(0, B, images):
        for first_token in range(0, N, tokens):
            yield slice(first_image, min(first_image + images, B)), slice(first_token, min(first_token + tokens, N))


class Scratch:
    """Named buffers that grow to the largest block and are then used again.

    Args:
        like: gives the device and, promoted to fp32 at least, the dtype of the buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.device = like.device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, b: int, n: int, H: int, d: int) -> Tensor:
        """A buffer (b, n, H, d) in an order that `flat` can view.

        Args:
            name: the same name gives the same memory.
            b: images.
            n: tokens.
            H: heads.
            d: channels.
        """
        size = b * n * H * d
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        taken = buffer[:size]
        return taken.view(b, n, H, d) if b == 1 else taken.view(b, H, n, d).transpose(1, 2)

    def load(self, name: str, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """A block in the buffers' dtype: itself where it is that already.

        Args:
            name: of the buffer, if it takes one.
            x: (b, n, H, d).
            keep: True for the tokens that count (b, n); the others become 0, whatever they hold. None keeps all.
        """
        if keep is None and x.dtype == self.dtype:
            return x
        loaded = self.take(name, *x.shape).copy_(x)
        return loaded if keep is None else loaded.masked_fill_(~keep[:, :, None, None], 0.0)


class Features(NamedTuple):
    """A block on its way: x, relu(mirror(x)), that to the power, and that rotated; equal steps share a tensor."""

    x: Tensor
    base: Tensor
    phi: Tensor
    roped: Tensor


class TokenMap:
    """phi(x) = relu(mirror(x))^power and its rotation over one sequence, block by block.

    Args:
        x: (B, N, H, d) of any float dtype and strides.
        mirror_cos: cos 2t (B or 1, H, J) in the scratch's dtype, or None.
        mirror_sin: sin 2t, likewise.
        rope_cos: (N, J) in the scratch's dtype, or None.
        rope_sin: likewise.
        mask: True for the tokens that count (B, N), or None.
        power: exponent >= 1.
        scratch: buffers for one map.
    """

    def __init__(
        self,
        x: Tensor,
        mirror_cos: Tensor | None,
        mirror_sin: Tensor | None,
        rope_cos: Tensor | None,
        rope_sin: Tensor | None,
        mask: Tensor | None,
        power: float,
        scratch: Scratch,
    ) -> None:
        self.x, self.mask, self.power, self.scratch = x, mask, power, scratch
        self.rope = None if rope_cos is None or rope_sin is None else (rope_cos, rope_sin)
        self.reflection = self._mirror_grad = None
        if mirror_cos is not None and mirror_sin is not None:
            self.reflection = torch.complex(-mirror_cos, -mirror_sin).unsqueeze(1)  # (B or 1, 1, H, J)
            self._mirror_grad = torch.zeros_like(self.reflection)

    def forward(self, images: slice, tokens: slice) -> Features:
        """Map one block.

        Args:
            images: of the block.
            tokens: of the block.

        Returns:
            Its features; all but x live in buffers that the next block overwrites.
        """
        keep = None if self.mask is None else self.mask[images, tokens]
        x = self.scratch.load("x", self.x[images, tokens], keep)
        if self.reflection is not None and not _paired(x):
            x = self.scratch.take("x", *x.shape).copy_(x)
        base = self.scratch.take("base", *x.shape)
        if self.reflection is None:
            torch.clamp_min(x, 0.0, out=base)
        else:
            self._reflect(x, images, out=base).relu_()
        phi = base if self.power == 1.0 else torch.pow(base, self.power, out=self.scratch.take("phi", *x.shape))
        if self.rope is None:
            return Features(x, base, phi, phi)
        roped = self.scratch.take("roped", *x.shape)
        torch.mul(_complex(phi), self._turn(tokens), out=_complex(roped))
        return Features(x, base, phi, roped)

    def unrotate(self, grad: Tensor, tokens: slice) -> Tensor:
        """Turn the gradient of `roped` back, in place.

        Args:
            grad: (b, n, H, d).
            tokens: of the block.
        """
        if self.rope is not None:
            _complex(grad).mul_(self._turn(tokens).conj_physical_())
        return grad

    def backward(self, features: Features, grad: Tensor, images: slice, target: Tensor) -> None:
        """From the gradient of phi to that of x and, added up inside, of the mirrors.

        Args:
            features: of this block, from `forward`.
            grad: of phi (b, n, H, d); overwritten.
            images: of the block.
            target: where the gradient of x is written (b, n, H, d).
        """
        if self.power != 1.0:
            slope = torch.pow(features.base, self.power - 1.0, out=self.scratch.take("slope", *grad.shape))
            grad.mul_(slope.mul_(self.power))
        torch.ops.aten.threshold_backward.grad_input(grad, features.base, 0.0, grad_input=grad)
        if self.reflection is None:
            target.copy_(grad)
            return
        assert self._mirror_grad is not None
        products = torch.mul(
            _complex(grad), _complex(features.x), out=_complex(self.scratch.take("slope", *grad.shape))
        )
        if self._mirror_grad.shape[0] == 1:
            self._mirror_grad += products.sum((0, 1), keepdim=True)
        else:
            self._mirror_grad[images] += products.sum(1, keepdim=True)
        if target.dtype == grad.dtype:
            self._reflect(grad, images, out=target)  # a reflection is its own transpose
        else:
            target.copy_(self._reflect(grad, images, out=self.scratch.take("slope", *grad.shape)))

    def mirror_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of cos 2t and sin 2t, each (B or 1, H, J); empty without mirrors."""
        if self._mirror_grad is None:
            return self.x.new_empty(0), self.x.new_empty(0)
        total = self._mirror_grad.squeeze(1)
        return -total.real, -total.imag

    def _reflect(self, x: Tensor, images: slice, *, out: Tensor) -> Tensor:
        assert self.reflection is not None
        table = self.reflection if self.reflection.shape[0] == 1 else self.reflection[images]
        torch.conj_physical(_complex(x), out=_complex(out)).mul_(table)
        return out

    def _turn(self, tokens: slice) -> Tensor:
        """cos + i sin of a block's tokens (n, 1, J), in a buffer of its own."""
        assert self.rope is not None
        cos, sin = (table[tokens] for table in self.rope)
        turn = torch.view_as_complex(self.scratch.take("turn", 1, cos.shape[0], cos.shape[1], 2))
        return torch.complex(cos, sin, out=turn[0]).unsqueeze(1)


def flat(x: Tensor) -> Tensor:
    """(b, n, H, d) -> (b·H, n, d): a view of one image, of one head and of scratch, else a copy."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def product(a: Tensor, matrices: Tensor, out: Tensor) -> Tensor:
    """Multiply every head's tokens by its matrix.

    Args:
        a: (b, n, H, d).
        matrices: (b, H, d, e), of a's dtype.
        out: (b, n, H, e) of any float dtype; written and returned.
    """
    b, _, H, _ = a.shape
    if out.dtype == a.dtype and (b == 1 or H == 1):  # the result goes where it belongs
        torch.bmm(flat(a), matrices.flatten(0, 1), out=out[0].transpose(0, 1) if b == 1 else out[:, :, 0])
        return out
    return out.copy_(torch.bmm(flat(a), matrices.flatten(0, 1)).unflatten(0, (b, H)).transpose(1, 2))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _paired(x: Tensor) -> bool:
    """Whether pairs of channels can be seen as complex numbers."""
    return bool(x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(step % 2 == 0 for step in x.stride()[:-1]))
