"""What a trained network's attention does with one image, as figures: where tokens look, and what the mirrors keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from mirrorla.attention_maps import attention_weights
from mirrorla.diagnostics import probe_layers, retained_energy
from mirrorla.mirrors import NEUTRAL_ANGLE

MAX_LAYERS = 4


@dataclass(frozen=True)
class LayerView:
    """What one layer does with one image.

    Attributes:
        number: of the layer, from 0, in the order they run.
        stride: height and width of a token in pixels; the last ones may reach beyond the image.
        weights: attention of each query, mean over heads (n, h, w).
        has_mirrors: whether the rest says something.
        energy: share of the energy that ReLU keeps of queries and keys, per head (H,).
        energy_before: the same without the block mirrors (H,).
        angles: of the block mirrors for this image, degrees (H, J); None without block mirrors.
    """

    number: int
    stride: tuple[float, float]
    weights: NDArray[np.float32]
    has_mirrors: bool
    energy: NDArray[np.float32]
    energy_before: NDArray[np.float32]
    angles: NDArray[np.float32] | None


def look(network: nn.Module, image: Tensor, places: Sequence[tuple[float, float]]) -> list[LayerView]:
    """Run one image through a network and look into its attention layers.

    Args:
        network: with MirrorAttention layers of any kind; others are passed over.
        image: (3, H, W), normalised.
        places: of the queries, as shares (y, x) of the image's height and width, each in [0, 1].

    Returns:
        Layers with a grid of tokens, in the order they run.
    """
    views = []
    for number, (layer, probe) in enumerate(probe_layers(network, image[None], softmax=True)):
        if probe.grid is None:
            continue
        height, width = probe.grid
        first = probe.v.shape[1] - height * width  # tokens before the grid, such as a class token
        stride = token_side(image.shape[1], height), token_side(image.shape[2], width)
        cells = [
            min(int(y * image.shape[1] / stride[0]), height - 1) * width
            + min(int(x * image.shape[2] / stride[1]), width - 1)
            for y, x in places
        ]
        queries = torch.tensor(cells, device=image.device) + first
        weights = attention_weights(layer, probe, queries)[0, :, :, first:].mean(0)
        views.append(
            LayerView(
                number,
                stride,
                weights.unflatten(-1, probe.grid).cpu().numpy(),
                layer.mirrors is not None,
                _kept(probe.mirrored),
                _kept(probe.crossed),
                None if probe.angle is None else np.degrees(probe.angle[0].cpu().numpy()),
            )
        )
    return views


def token_side(pixels: int, tokens: int) -> float:
    """Pixels along a token: the power of two by which a pyramid divides a side, rounding up, or else an even share."""
    for exponent in range(10):
        if -(-pixels // 2**exponent) == tokens:
            return float(2**exponent)
    return pixels / tokens


def chosen_layers(grids: Sequence[tuple[int, int]], most: int = MAX_LAYERS) -> list[int]:
    """The layers worth a row: the last of every size of grid, or evenly spaced ones where all have the same.

    Args:
        grids: height and width of the tokens of each layer.
        most: how many at most.
    """
    if not grids:
        return []
    last = sorted({grid: place for place, grid in enumerate(grids)}.values())
    if len(last) == 1:
        return sorted({round(place) for place in np.linspace(0, len(grids) - 1, min(most, len(grids)))})
    return last[-most:]


def attention_figure(
    picture: NDArray[np.uint8], places: Sequence[tuple[float, float]], views: list[LayerView]
) -> Figure:
    """A row for each chosen layer, a column for each query: blue weights are positive, red ones negative.

    Args:
        picture: (H, W, 3), what the network sees.
        places: of the queries, as shares.
        views: of all layers.
    """
    rows = [views[place] for place in chosen_layers([view.weights.shape[1:] for view in views])]
    height, width = picture.shape[:2]
    cell = 2.2
    size = (cell * len(places) + 0.6, (cell * height / width + 0.3) * len(rows) + 0.3)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(places), squeeze=False)
    for view, line in zip(rows, axes, strict=True):
        grid = "x".join(str(side) for side in view.weights.shape[1:])
        line[0].set_ylabel(f"layer {view.number}\n{grid} tokens", fontsize=8)
        covered = (0, view.weights.shape[2] * view.stride[1], view.weights.shape[1] * view.stride[0], 0)
        for axis, weights, (y, x) in zip(line, view.weights, places, strict=True):
            bound = float(np.abs(weights).max()) or 1.0
            axis.imshow(picture.mean(2), cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
            axis.imshow(
                weights, cmap="RdBu", vmin=-bound, vmax=bound, alpha=0.65, extent=covered, interpolation="nearest"
            )
            axis.plot(x * width, y * height, "o", markersize=7, markeredgecolor="k", markerfacecolor="#ffcc00")
            axis.set_title(f"most {bound * weights.size:.1f} x uniform", fontsize=7)
            axis.set(xlim=(0, width), ylim=(height, 0))
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def mirrors_figure(fresh: list[LayerView], trained: list[LayerView]) -> Figure:
    """Energy that ReLU keeps and angles, head by head, before training and after.

    Args:
        fresh: of the same network with its first weights.
        trained: of the trained one, the same layers, all with mirrors.
    """
    figure = Figure(
        figsize=(max(6.0, 0.55 * sum(len(view.energy) for view in trained)), 5), dpi=100, layout="constrained"
    )
    energy, angles = figure.subplots(2, 1, sharex=True)
    ends = np.cumsum([len(view.energy) for view in trained])
    heads = np.arange(ends[-1])
    series = (
        ("before training", np.concatenate([view.energy for view in fresh]), "o", "#999999"),
        ("trained, without block mirrors", np.concatenate([view.energy_before for view in trained]), "_", "#d95f02"),
        ("trained", np.concatenate([view.energy for view in trained]), "o", "#1b9e77"),
    )
    for label, values, marker, colour in series:
        energy.plot(heads, values, marker, color=colour, label=label, markersize=8 if marker == "_" else 5)
    energy.set_ylabel("energy ReLU keeps")
    energy.set_ylim(0, 1)
    energy.legend(fontsize=7, loc="lower right")
    start = 0
    for before, after in zip(fresh, trained, strict=True):
        for views, shift, colour in ((before, -0.15, "#999999"), (after, 0.15, "#1b9e77")):
            if views.angles is not None:
                place = np.repeat(np.arange(len(views.angles)) + start + shift, views.angles.shape[1])
                angles.plot(place, views.angles.ravel(), ".", color=colour, markersize=3, alpha=0.6)
        start += len(after.energy)
    angles.axhline(np.degrees(NEUTRAL_ANGLE), color="k", linewidth=0.6, linestyle=":")
    angles.set_ylabel("mirror angles (degrees)\ndotted: plain ReLU")
    for axis in (energy, angles):
        for end in ends[:-1]:
            axis.axvline(end - 0.5, color="#cccccc", linewidth=0.6)
    angles.set_xticks((ends + np.concatenate(([0], ends[:-1])) - 1) / 2, [f"{view.number}" for view in trained])
    angles.set_xlabel("layer, one column per head")
    return figure


def _kept(pair: tuple[Tensor, Tensor]) -> NDArray[np.float32]:
    heads = range(pair[0].shape[2])
    both = torch.cat(pair, dim=1)
    kept: NDArray[np.float32] = torch.stack([retained_energy(both[:, :, head]) for head in heads]).cpu().numpy()
    return kept
