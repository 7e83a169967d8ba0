"""Mixup and cutmix for any batch size, and the soft targets of the classification loss."""

from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class MixConfig:
    """Strength of mixup and cutmix; both 0 turns mixing off.

    Attributes:
        mixup: alpha of mixup's Beta distribution.
        cutmix: alpha of cutmix's Beta distribution.
        switch_prob: chance of cutmix when both are on.
        prob: chance that a batch is mixed at all.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    prob: float = 1.0

    def __post_init__(self) -> None:
        """Refuse negative strengths and chances outside [0, 1].

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"mix.{name} {getattr(self, name)} must be 0 or above; 0 turns it off")
        for name in ("switch_prob", "prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mix.{name} {getattr(self, name)} must lie in [0, 1]")

    @property
    def is_on(self) -> bool:
        """Whether any mixing happens."""
        return self.mixup > 0 or self.cutmix > 0


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Label smoothing as a distribution.

    Args:
        labels: (B,) int64.
        num_classes: C.
        smoothing: mass spread evenly over all classes, in [0, 1).

    Returns:
        (B, C) float32, rows sum to 1.
    """
    return one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


class Mixer:
    """timm's batch-wise mixup/cutmix, with an odd last sample left as it is.

    Randomness comes from numpy's global generator, which the training seeds per step and rank.

    Args:
        config: strengths.
        num_classes: C.
        smoothing: label smoothing of the targets.
    """

    def __init__(self, config: MixConfig, num_classes: int, smoothing: float) -> None:
        self._num_classes = num_classes
        self._smoothing = smoothing
        self._mixup: Mixup | None = None
        if config.is_on:
            self._mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.prob,
                switch_prob=config.switch_prob,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch. A good sample whose partner was skipped stays as it is, instead of fading to black.

        Args:
            images: (B, 3, H, W); not changed.
            labels: (B,) int64.
            weights: (B,), 0 for a skipped sample.

        Returns:
            Mixed images (B, 3, H, W) and targets (B, C) float32.
        """
        targets = smooth_targets(labels, self._num_classes, self._smoothing)
        even = len(images) // 2 * 2
        if self._mixup is None or even == 0:
            return images, targets
        own = torch.arange(even, device=images.device)
        chosen = torch.where(weights[:even] > 0, own, own.flip(0))  # timm pairs sample i with even - 1 - i
        mixed, mixed_targets = self._mixup(images[:even][chosen], labels[:even][chosen])
        return torch.cat([mixed, images[even:]]), torch.cat([mixed_targets.float(), targets[even:]])
