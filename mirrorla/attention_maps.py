"""Where tokens look: the attention that a linear layer never writes down, for the few queries one wants to see."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrorla.attention import MirrorAttention
from mirrorla.diagnostics import LayerProbe, features
from mirrorla.feature_maps import FeatureMap, Softmax
from mirrorla.positions import rotate


def attention_weights(layer: MirrorAttention, probe: LayerProbe, queries: Tensor, eps: float = 1e-6) -> Tensor:
    """What each value is multiplied with: y_n = sum_m w_nm v_m, equation y of the layer, for chosen n.

    Rotary positions turn the numerator of linear maps alone, so weights can be negative and need not sum to 1. A map
    of several streams weighs parts of the channels differently: theirs are averaged.

    Args:
        layer: mirror attention or a peer's.
        probe: of the layer.
        queries: indices of tokens (n,).
        eps: the layer's.

    Returns:
        (B, H, n, N).
    """
    tables = probe.rope
    if isinstance(layer.map, Softmax):
        q, k = probe.mirrored
        q = q[:, queries]
        if tables is not None:
            cos, sin = tables
            q, k = rotate(q, cos[queries], sin[queries]), rotate(k, cos, sin)
        return (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    if isinstance(layer.map, FeatureMap):
        tables = layer.map.tables(tables)
    weights = []
    for phi_q, phi_k, _ in features(layer, probe):
        phi_n = phi_q[:, queries]
        denominator = torch.einsum("bnhd,bhd->bhn", phi_n, phi_k.mean(1)) + eps
        if tables is not None:
            cos, sin = tables
            phi_n, phi_k = rotate(phi_n, cos[queries], sin[queries]), rotate(phi_k, cos, sin)
        numerator = torch.einsum("bnhd,bmhd->bhnm", phi_n, phi_k) / phi_k.shape[1]
        weights.append(numerator / denominator.unsqueeze(-1))
    return torch.stack(weights).mean(0)
