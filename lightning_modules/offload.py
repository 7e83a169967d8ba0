"""What DeepSpeed needs on a node before it can move parameters or optimizer state to disks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PARTS = ("offload_optimizer", "offload_param")


def require_disks(config: Mapping[str, Any]) -> None:
    """Refuse offloading to disks that cannot work here; DeepSpeed would make the folder wherever that is.

    Args:
        config: DeepSpeed's.

    Raises:
        ValueError: no such folder, or no libaio; with the mend.
    """
    zero = config.get("zero_optimization") or {}
    folders = {part: zero[part].get("nvme_path") for part in _PARTS if (zero.get(part) or {}).get("device") == "nvme"}
    for part, folder in folders.items():
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"zero_optimization.{part}.nvme_path {folder} is no folder; make it on a local disk of every node, or "
                "name another in a copy of configs/deepspeed/zero3_nvme.yaml"
            )
    if folders and not has_asynchronous_io():
        raise ValueError(
            "zero_optimization offloads to nvme, which needs libaio with its headers on every node (Debian: "
            "libaio-dev); install it, or use --config deepspeed/zero3_cpu"
        )


def has_asynchronous_io() -> bool:
    """Whether DeepSpeed can build what reads and writes disks beside the training."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    found: bool = AsyncIOBuilder().is_compatible(verbose=False)
    return found
