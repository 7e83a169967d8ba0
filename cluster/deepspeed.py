"""DeepSpeed's configuration as a dictionary, and what one means for memory. Pure.

Batch sizes, accumulation, clipping and precision are the Trainer's and never stand here: two places would disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal[1, 2, 3]
Offload = Literal["none", "cpu", "nvme"]

TRAINERS_OWN = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "optimizer": "model.optim",
    "scheduler": "model.optim",
}
"""Keys of a DeepSpeed configuration that another setting already decides, and which one."""


@dataclass(frozen=True)
class Division:
    """What is divided among ranks, and what leaves the GPU.

    Attributes:
        stage: 0 divides nothing (DDP), 1 the optimizer state, 2 gradients too, 3 parameters too (as fsdp2 does).
        offloads_optimizer: the optimizer state lives in the node's memory or on its disks.
        offloads_parameters: the parameters do.
    """

    stage: int = 0
    offloads_optimizer: bool = False
    offloads_parameters: bool = False


def settings(stage: Stage, offload: Offload = "none", nvme_path: str | None = None) -> dict[str, Any]:
    """A DeepSpeed configuration.

    Args:
        stage: 1 divides the optimizer state among ranks, 2 the gradients too, 3 the parameters too.
        offload: where what is divided rests: on the GPUs, in main memory (stage 2 and 3) or on local disks (stage 3).
        nvme_path: folder on a local disk of every node, with offload="nvme".

    Raises:
        ValueError: an offload that the stage cannot do, or a missing folder.
    """
    if offload != "none" and stage == 1:
        raise ValueError(f"offload {offload!r} needs stage 2 or 3, not {stage}")
    if offload == "nvme" and stage != 3:
        raise ValueError(f"offload 'nvme' needs stage 3, not {stage}; 'cpu' works with {stage}")
    if (offload == "nvme") != (nvme_path is not None):
        raise ValueError(f"nvme_path {nvme_path!r} belongs to offload 'nvme', which is {offload!r}")
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if offload != "none":
        place = {"device": offload, "pin_memory": True} | ({"nvme_path": nvme_path} if nvme_path else {})
        zero["offload_optimizer"] = dict(place)
        if stage == 3:
            zero["offload_param"] = dict(place)
    # The optimizer is ours, whatever its place; DeepSpeed would insist on its own for one in main memory.
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def division(config: Mapping[str, Any]) -> Division:
    """What a DeepSpeed configuration divides and offloads."""
    zero = config.get("zero_optimization") or {}

    def leaves(part: str) -> bool:
        return str((zero.get(part) or {}).get("device", "none")) != "none"

    return Division(int(zero.get("stage", 0)), leaves("offload_optimizer"), leaves("offload_param"))


def require_stage(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names no stage, as one does which lost it.

    An option of the command line that reaches into a block, as --trainer.strategy.config.zero_optimization.stage 2,
    puts itself, as text, in place of the whole block: offloading and all.

    Raises:
        ValueError: naming what is left, with the mend.
    """
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(
            f"trainer.strategy.config.zero_optimization {zero} has no stage 1, 2 or 3; an option that reaches into it "
            "replaces all of it: change it in a copy of configs/deepspeed/zero1.yaml (zero2, zero3, …), or give the "
            """whole block: --trainer.strategy.config.zero_optimization '{"stage": 2, …}'"""
        )


def named_twice(config: Mapping[str, Any]) -> list[str]:
    """One sentence for every key that another setting already decides."""
    return [
        f"DeepSpeed's {key} is decided by {owner}; take it out of trainer.strategy.config"
        for key, owner in TRAINERS_OWN.items()
        if key in config
    ]
