"""Exponential moving average of the weights, evaluated and checkpointed beside the trained ones.

Why timm's ModelEmaV3 and not a weight swap: it is a second module whose tensors sit in the LightningModule's
state_dict, so a checkpoint holds both sets, a strict load restores both bit for bit, and a stop in the middle of a
validation can never leave averaged weights in the trained model (a swapping callback can). Its decay is a pure function
of the optimizer step given by the caller: there is no counter of its own to restore. BatchNorm's running statistics are
averaged like the weights and its integer counters are copied; averaging the integers, as torch's AveragedModel does
with buffers on, truncates them.
"""

from timm.utils.model_ema import ModelEmaV3
from torch import nn


class ExponentialAverage(ModelEmaV3):
    """A copy of a module, in `.module`, that follows it: average <- d * average + (1 - d) * weights.

    `update(model, step)` takes in the weights after optimizer step number `step` (counted from 1); the first one
    copies them.

    Args:
        model: the module to follow; call this before `torch.compile` and before any distributed wrapper.
        decay: the final decay d, for example 0.9999.
        warmup: grow the decay as 1 - (1 + step) ** (-2 / 3) until it reaches `decay`, for short runs.

    Raises:
        ValueError: when decay is outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"model.ema_decay {decay} must lie between 0 and 1, for example 0.9999; null turns it off")
        super().__init__(model, decay=decay, use_warmup=warmup)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "ExponentialAverage":
        """Stay in evaluation mode whatever the trained module does."""
        super().train(False)
        return self
