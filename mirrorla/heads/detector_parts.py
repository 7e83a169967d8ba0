"""What both detectors stand on: a backbone with its pyramid, anchors of exact strides, batches of images as given.

Images come resized and normalised; a training batch is only padded to its largest image. Anchors have the strides they
were designed for, whatever the image's size, and float32 coordinates, whatever the maps' precision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from mirrorla.dense import DenseBackbone
from mirrorla.heads.fpn import FPN, Extra

Target = dict[str, Tensor]
RATIOS = (0.5, 1.0, 2.0)


class PyramidBackbone(nn.Module):
    """A backbone with its feature pyramid, in the form torchvision's detectors expect.

    Args:
        trunk: the backbone.
        channels: of the pyramid.
        extra: coarser levels, see FPN.

    Attributes:
        out_channels: channels of every level.
        strides: of every level.
    """

    def __init__(self, trunk: DenseBackbone, channels: int, extra: Extra) -> None:
        super().__init__()
        self.trunk = trunk
        self.fpn = FPN(trunk.channels, channels, extra)
        self.out_channels = channels
        self.strides = trunk.strides + tuple(trunk.strides[-1] * 2 ** (i + 1) for i in range(self.fpn.num_extra))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (b, 3, H, W) -> levels by "0", "1", … from the finest."""
        return OrderedDict((str(place), x) for place, x in enumerate(self.fpn(self.trunk(images))))


class PyramidAnchors(AnchorGenerator):
    """Anchors whose distance is the level's stride; torchvision's divides sizes, which is off for an odd side.

    Args:
        strides: of the levels.
        scale: side of the smallest anchor in strides.
        octaves: sizes on each level, evenly spread over a factor of two.
    """

    def __init__(self, strides: Sequence[int], scale: float, octaves: int) -> None:
        sizes = tuple(tuple(int(stride * scale * 2 ** (k / octaves)) for k in range(octaves)) for stride in strides)
        super().__init__(sizes, (RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """One (A, 4) float32 tensor of corners for each image, the same for all."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(x.shape[2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class AsGiven(GeneralizedRCNNTransform):
    """Only batches: images come resized and normalised, and results are mapped back by `in_original_pixels`."""

    def __init__(self) -> None:
        super().__init__(0, 0, [0.0] * 3, [1.0] * 3, size_divisible=1)

    def normalize(self, image: Tensor) -> Tensor:
        """The image, as it is."""
        return image

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Image and target, as they are."""
        return image, target

    def postprocess(self, result: list[Target], image_shapes: Any, original_image_sizes: Any) -> list[Target]:
        """Detections, as they are."""
        return result
