"""Where tokens look: the attention that a linear layer never writes down, for the few queries one wants to see."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrorla.diagnostics import LayerProbe
from mirrorla.kernels.reference import feature_map
from mirrorla.positions import rotate


def attention_weights(probe: LayerProbe, queries: Tensor, power: float = 1.0, eps: float = 1e-6) -> Tensor:
    """What each value is multiplied with: y_n = sum_m w_nm v_m, equation y of the layer, for chosen n.

    Rotary positions turn the numerator alone, so weights can be negative and need not sum to 1.

    Args:
        probe: of the layer.
        queries: indices of tokens (n,).
        power: the layer's exponent of ReLU.
        eps: the layer's.

    Returns:
        (B, H, n, N).
    """
    phi_q, phi_k = (feature_map(x, power=power) for x in probe.mirrored)
    phi_q = phi_q[:, queries]
    denominator = torch.einsum("bnhd,bhd->bhn", phi_q, phi_k.mean(1)) + eps
    if probe.rope is not None:
        cos, sin = probe.rope
        phi_q, phi_k = rotate(phi_q, cos[queries], sin[queries]), rotate(phi_k, cos, sin)
    numerator = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k) / phi_k.shape[1]
    return numerator / denominator.unsqueeze(-1)
