"""What the mirrors do, in numbers: the metrics that back the claims, on a fixed batch, without gradients, in fp32.

Linear peers answer to the same tags, but for what is of mirrors alone; softmax has no features to look at.

Shapes: B images, N tokens, H heads, d channels of a head, J = d/2 blocks, C = H·d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrorla.attention import MirrorAttention
from mirrorla.feature_maps import FeatureMap, Stream
from mirrorla.kernels.reference import Tables, feature_map, kv_state
from mirrorla.mirrors import block_mirror, cross_head_mirror, reflect_rows

MAX_QUERIES = 256
"""Rows of the attention matrix looked at for the entropy: it is the only quadratic part here."""


@dataclass(frozen=True)
class LayerProbe:
    """Queries, keys and values of one layer on the probe batch, fp32.

    Attributes:
        raw: queries and keys straight from the learned projection, each (B, N, H, d).
        crossed: the same after the cross-head mirror.
        mirrored: the same after the block mirrors: what ReLU, or a peer's map, sees; queries through the keys' mirror.
        queries: through the mirrors that they are read with, one for each share of the values.
        v: values (B, N, H, d).
        rho: relative variance (B or 1, H, J), or None without modulation.
        angle: mirror angles (B or 1, H, J) in radians, or None without block mirrors.
        rope: rotary tables (N, d/2), or None.
        grid: height and width of the tokens, or None.
    """

    raw: tuple[Tensor, Tensor]
    crossed: tuple[Tensor, Tensor]
    mirrored: tuple[Tensor, Tensor]
    queries: tuple[Tensor, ...]
    v: Tensor
    rho: Tensor | None
    angle: Tensor | None
    rope: Tables | None
    grid: tuple[int, int] | None


def probe_layers(
    model: nn.Module, images: Tensor, *, softmax: bool = False
) -> list[tuple[MirrorAttention, LayerProbe]]:
    """Run the images once and look into every linear attention layer, or into every one.

    Args:
        model: a model with MirrorAttention layers; its mode and buffers stay as they are.
        images: (B, 3, H, W).
        softmax: look into softmax layers too.

    Returns:
        Layers in the order they ran, each with its probe.
    """
    probes: list[tuple[MirrorAttention, LayerProbe]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(module, MirrorAttention)
        grid = inputs[1] if len(inputs) > 1 else options.get("grid")
        probes.append((module, _probe(module, inputs[0].float(), grid, options.get("prefix", 0))))

    layers = [m for m in model.modules() if isinstance(m, MirrorAttention) and (softmax or _is_linear(m))]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with _frozen(model), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return probes


def mirror_metrics(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Scalars of every layer for TensorBoard.

    Args:
        model: a model with linear MirrorAttention layers; none gives an empty result.
        images: the fixed probe batch (B, 3, H, W).

    Returns:
        Tags such as "mirror/retained_energy/q/layer_3" to values.
    """
    metrics: dict[str, float] = {}
    for index, (layer, probe) in enumerate(probe_layers(model, images)):
        for tag, value in _layer_metrics(layer, probe).items():
            metrics[f"{tag}/layer_{index}"] = float(value)
    return metrics


def mirror_histograms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Angles, their modulation and the relative variance of every layer.

    Args:
        model: a model with MirrorAttention layers.
        images: the fixed probe batch (B, 3, H, W).

    Returns:
        Tags such as "mirror/theta/layer_3" to flat tensors; angles in radians.
    """
    values: dict[str, Tensor] = {}
    for index, (layer, probe) in enumerate(probe_layers(model, images)):
        if layer.mirrors is None:
            continue
        theta = layer.mirrors.theta
        if theta is not None and probe.angle is not None:
            values[f"mirror/theta/layer_{index}"] = theta.detach().flatten()
            if probe.rho is not None:
                values[f"mirror/delta_alpha/layer_{index}"] = (probe.angle - theta).flatten()
                values[f"mirror/rho/layer_{index}"] = probe.rho.flatten()
        if layer.mirrors.u is not None:
            values[f"mirror/u_head_energy/layer_{index}"] = head_energy(layer.mirrors.u.detach(), layer.num_heads)
    return values


def retained_energy(x: Tensor) -> Tensor:
    """Share of the energy that ReLU keeps: sum relu(x)^2 / sum x^2, a scalar in [0, 1]."""
    return x.relu().square().sum() / x.square().sum().clamp(min=torch.finfo(x.dtype).tiny)


def effective_rank(state: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values.

    Args:
        state: matrices (..., m, n).

    Returns:
        (...,) between 1 and min(m, n); 0 for a zero matrix.
    """
    values = torch.linalg.svdvals(state)
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.exp(torch.special.entr(share).sum(-1)) * (total.squeeze(-1) > 0)


def attention_entropy(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """Mean entropy of the attention rows over log N: 1 is uniform, 0 looks at a single token.

    Args:
        phi_q: mapped queries (B, N, H, d); at most `MAX_QUERIES` evenly spaced rows are used.
        phi_k: mapped keys (B, M, H, d), M >= 2.

    Returns:
        A scalar; rows whose query map is zero count as uniform, which is how the layer treats them.
    """
    N, M = phi_q.shape[1], phi_k.shape[1]
    rows = torch.linspace(0, N - 1, min(N, MAX_QUERIES), device=phi_q.device).round().long()
    scores = torch.einsum("bnhd,bmhd->bhnm", phi_q[:, rows], phi_k)
    total = scores.sum(-1, keepdim=True)
    weights = torch.where(total > 0, scores / total.clamp(min=torch.finfo(scores.dtype).tiny), 1.0 / M)
    return torch.special.entr(weights).sum(-1).mean() / torch.log(torch.tensor(float(M)))


def head_energy(u: Tensor, num_heads: int) -> Tensor:
    """How the cross-head normal spreads over the heads.

    Args:
        u: normal (C,).
        num_heads: heads H.

    Returns:
        (H,) shares of |u|^2, summing to 1.
    """
    energy = u.unflatten(0, (num_heads, -1)).square().sum(-1)
    return energy / energy.sum().clamp(min=torch.finfo(u.dtype).tiny)


@torch.no_grad()
def _layer_metrics(layer: MirrorAttention, probe: LayerProbe) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    if layer.mirrors is not None or (isinstance(layer.map, FeatureMap) and layer.map.cuts):
        seen = (torch.cat(probe.queries, 1), probe.mirrored[1])
        for name, before, after in zip("qk", probe.raw, seen, strict=True):
            metrics[f"mirror/retained_energy_before/{name}"] = retained_energy(before)
            metrics[f"mirror/retained_energy/{name}"] = retained_energy(after)
            metrics[f"mirror/dead_channels/{name}"] = (after.amax((0, 1)) <= 0).float().mean()
    streams, rope = features(layer, probe), probe.rope
    if isinstance(layer.map, FeatureMap):
        rope = layer.map.tables(rope)
    if probe.v.shape[1] > 1:
        metrics["attn/entropy"] = torch.stack([attention_entropy(q, k) for q, k, _ in streams]).mean()
    states = [kv_state(phi_k, v, rope=rope) for _, phi_k, v in streams]  # ReLU(phi) = phi
    metrics["attn/erank_kv"] = torch.stack([effective_rank(state).mean() for state, _, _ in states]).mean()
    lowest = [
        torch.einsum("bnhd,bhd->bnh", phi_q, mean).min()
        for (phi_q, _, _), (_, mean, _) in zip(streams, states, strict=True)
    ]
    metrics["attn/denominator_min"] = torch.stack(lowest).min()
    return metrics | _mirror_only(layer, probe)


def _mirror_only(layer: MirrorAttention, probe: LayerProbe) -> dict[str, Tensor]:
    """What a peer has not."""
    metrics: dict[str, Tensor] = {}
    if layer.mirrors is None:
        return metrics
    if layer.mirrors.u is not None:
        energy = head_energy(layer.mirrors.u.detach(), layer.num_heads)
        metrics["mirror/u_head_energy_max"] = energy.max()
        metrics["mirror/head_cov_offdiag_before"] = _off_diagonal_covariance(probe.raw[0])
        metrics["mirror/head_cov_offdiag_after"] = _off_diagonal_covariance(probe.crossed[0])
    if probe.angle is not None or layer.mirrors.u is not None:
        metrics["mirror/orthogonality_err"] = _orthogonality_error(layer, probe)
    return metrics


def _is_linear(layer: MirrorAttention) -> bool:
    return layer.mirrors is not None or isinstance(layer.map, FeatureMap)


def features(layer: MirrorAttention, probe: LayerProbe) -> list[Stream]:
    """The features that a linear layer attends with: phi(q), phi(k) and the values of each stream."""
    q, k = probe.mirrored
    if isinstance(layer.map, FeatureMap):
        return layer.map.streams(q, k, probe.v)
    assert layer.mirrors is not None
    power, queries = layer.mirrors.config.power, probe.queries
    phi_k, shares = feature_map(k, power=power), probe.v.chunk(len(queries), -1)
    return [(feature_map(one, power=power), phi_k, v) for one, v in zip(queries, shares, strict=True)]


def _probe(layer: MirrorAttention, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> LayerProbe:
    C, heads, mirrors = layer.dim, (layer.num_heads, layer.head_dim), layer.mirrors

    bias = layer.qkvg.bias
    packed = nn.functional.linear(x, layer.qkvg.weight.float(), None if bias is None else bias.float())
    q_raw, k_raw, v = packed.split(C, dim=-1)[:3]
    raw = q_raw.unflatten(-1, heads), k_raw.unflatten(-1, heads)
    q, k = raw
    rho = angle = None
    if mirrors is not None:
        if mirrors.u is not None:
            q, k = (cross_head_mirror(x, mirrors.u.float()).unflatten(-1, heads) for x in (q_raw, k_raw))
        if mirrors.config.modulation != "none":
            seen = (q[:, prefix:], k[:, prefix:], None, None)
            rho = mirrors.relative_variance(*seen) if mirrors.running_rho is None else mirrors.running_rho[None]
            angle = mirrors.angles(rho)
        elif mirrors.theta is not None:
            angle = mirrors.theta.unsqueeze(0)
    mirrored = (q, k) if angle is None else (_turn(q, angle), _turn(k, angle))
    queries: tuple[Tensor, ...] = mirrored[:1]
    if angle is not None and mirrors is not None and mirrors.offset is not None:
        queries = tuple(_turn(q, angle + offset) for offset in mirrors.offset)
    rope = layer.rope(grid, x.device, prefix)
    return LayerProbe(raw, (q, k), mirrored, queries, v.unflatten(-1, heads), rho, angle, rope, grid)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    return block_mirror(x, torch.cos(2 * angle).unsqueeze(1), torch.sin(2 * angle).unsqueeze(1))


def _off_diagonal_covariance(x: Tensor) -> Tensor:
    """Share of the squared covariance of all C channels that lies between different heads."""
    H, d = x.shape[2:]
    covariance = torch.cov(x.reshape(-1, H * d).T).square().reshape(H, d, H, d).sum((1, 3))  # (H, H)
    total = covariance.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return 1 - covariance.diagonal().sum() / total


def _orthogonality_error(layer: MirrorAttention, probe: LayerProbe) -> Tensor:
    """max |H^T H - I| of the whole map of the first image: cross-head, then block mirrors."""
    assert layer.mirrors is not None
    cos = sin = None
    if probe.angle is not None:
        cos, sin = torch.cos(2 * probe.angle[0]), torch.sin(2 * probe.angle[0])
    identity = torch.eye(layer.dim, device=probe.v.device)
    mirror = reflect_rows(identity, layer.mirrors.u, cos, sin)
    return (mirror.T @ mirror - identity).abs().max()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
