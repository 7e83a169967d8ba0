"""What to do about a loss or gradient that is not finite: decisions and measurements as functions of plain values."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.attempts import Record


@dataclass(frozen=True)
class Streak:
    """Steps skipped so far.

    Attributes:
        in_a_row: up to the latest step.
        total: since step 0 of the run.
    """

    in_a_row: int = 0
    total: int = 0

    def after(self, is_finite: bool) -> "Streak":
        """The streak after one more step."""
        return replace(self, in_a_row=0) if is_finite else Streak(self.in_a_row + 1, self.total + 1)


def not_finite(values: Iterable[Tensor]) -> Tensor:
    """Whether any of these tensors holds NaN or inf, without waiting for their device.

    Args:
        values: any shapes on one device; of a sharded tensor this rank's part.

    Returns:
        A float tensor (), 1 or 0; a norm is looked at, so finite values whose squares overflow count, too.
    """
    local = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    norm = nn.utils.get_total_norm([value.detach() for value in local if value.numel()])
    return (~torch.isfinite(norm)).float()


def good_step(steps: Sequence[int], done: int, in_a_row: int) -> int:
    """The checkpoint to go back to: the newest from which at least one step was finite.

    The one taken right before the first skipped step holds the very weights that gave it, so it is not good.

    Args:
        steps: of the committed checkpoints.
        done: optimizer steps done, the one under way left out.
        in_a_row: skipped steps, the one under way included.

    Returns:
        Its step; 0 for the beginning of the run.
    """
    last_finite = done - (in_a_row - 1)
    return max((step for step in steps if step < last_finite), default=0)


def count_rollbacks(attempts: Sequence[Record], step: int) -> int:
    """How many of the latest attempts, without one that ended otherwise, rolled back to this very checkpoint."""
    count = 0
    for attempt in reversed([attempt for attempt in attempts if attempt.outcome is not None]):
        if attempt.rolled_back_to != step:
            break
        count += 1
    return count


def tensor_norms(module: nn.Module) -> dict[str, dict[str, float | str | None]]:
    """Norms of every parameter and its gradient by name, for the eye: what is not finite reads "nan" or "inf".

    Args:
        module: any; of sharded parameters this rank's part is measured.
    """
    return {
        name: {"weight": _norm(parameter), "gradient": _norm(parameter.grad)}
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def plain(value: Any) -> float | str:
    """A number as JSON can hold it: NaN and inf as words."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _norm(tensor: Tensor | None) -> float | str | None:
    if tensor is None:
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return plain(torch.linalg.vector_norm(local.detach().float()))
