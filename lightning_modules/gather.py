"""One gather to rank 0, one computation there, one small answer to all: for states too big to add up over ranks.

It goes over gloo from the CPU, in a group with its own timeout: while rank 0 computes for minutes, the others wait
here and not in an NCCL collective, whose watchdog would end the run.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

State = TypeVar("State")
Answer = TypeVar("Answer")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for rank 0's computation. A rank that dies closes its connections and is noticed at once."""


def waiting_group() -> dist.ProcessGroup | None:
    """The gloo group of all ranks, made at the first call, which is a collective; None for a single process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return _gloo_group(dist.group.WORLD)


def compute_once(state: State, compute: Callable[[list[State]], Answer], group: dist.ProcessGroup | None) -> Answer:
    """Compute on rank 0 from the states of all ranks and give every rank the answer; a collective.

    Args:
        state: of this rank; pickled, so arrays rather than many small objects.
        compute: from the states in the order of ranks.
        group: from waiting_group(); None computes right here.

    Returns:
        The same answer on every rank.

    Raises:
        Exception: what compute raised, on rank 0.
        RuntimeError: the same in words, on the others, so that none waits for an answer that never comes.
    """
    if group is None:
        return compute([state])
    is_first = dist.get_rank(group) == 0
    first = dist.get_global_rank(group, 0)
    states: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(state, states, dst=first, group=group)
    answer: list[Any] = [None, None]  # or what went wrong
    failure = None
    if states is not None:
        try:
            answer[0] = compute(states)
        except Exception as error:
            failure, answer[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=first, group=group)
    if answer[1] is not None:
        raise failure or RuntimeError(f"rank 0 failed to evaluate: {answer[1]}")
    result: Answer = answer[0]
    return result


@lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Made once per process: a group per evaluation would pile up sockets. The key is what ends with the ranks."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # it holds all ranks, so this one too
    return group
