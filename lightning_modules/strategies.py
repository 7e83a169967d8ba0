"""How a run is spread over devices, and what that means for its checkpoints.

`--trainer.strategy` takes Lightning's names, and of this project:

    ddp                    gradients averaged over all ranks, rounded alike in every start
    fsdp2                  parameters, gradients and optimizer state divided among all ranks (fully_shard)
    zero1, zero2, zero3    DeepSpeed: optimizer state, gradients too, parameters too

They run on CPUs over gloo as on GPUs, so what is tested is what runs.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from cluster.deepspeed import require_stage
from lightning_modules.checkpoint import load_plain, read_manifest
from lightning_modules.checkpoint_io import agreed
from lightning_modules.commit import remove, temporary
from lightning_modules.ddp import SettledDDPStrategy
from lightning_modules.offload import require_disks
from lightning_modules.shards import SHARDS, gather, make_universal, values_only
from lightning_modules.tensorboard import Tag
from lightning_modules.training import is_log_step

MIN_PARAMETERS = 1_000_000
"""A block below this size is not divided on its own: gathering it would cost more than its memory."""


def register_strategies() -> None:
    """Make the names known to the Trainer; safe to call again."""
    StrategyRegistry.register("ddp", SettledDDPStrategy, "DDP with settled buckets", override=True)
    StrategyRegistry.register("fsdp2", FSDP2Strategy, "fully_shard over all ranks", override=True)
    for stage in (1, 2, 3):
        StrategyRegistry.register(f"zero{stage}", ZeroStrategy, f"DeepSpeed ZeRO {stage}", override=True, stage=stage)


def kind_of(strategy: Strategy) -> str:
    """How a strategy's checkpoints are written: "plain" by rank 0 alone, "fsdp" and "deepspeed" by all ranks.

    Raises:
        ValueError: one of Lightning's own sharded strategies, whose checkpoints do not go through the commit protocol.
    """
    if isinstance(strategy, ZeroStrategy):
        return "deepspeed"
    if isinstance(strategy, FSDP2Strategy):
        return "fsdp"
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} is not supported; use fsdp2, zero1, zero2 or zero3"
        )
    return "plain"


class FSDP2Strategy(ModelParallelStrategy):
    """Divide parameters, gradients and optimizer state among all ranks.

    Args:
        process_group_backend: null takes nccl for GPUs and gloo for CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """One mesh over all ranks; the module needs no configure_model of its own."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        module, mesh = self.lightning_module, self.device_mesh["data_parallel"]
        assert module is not None
        module.configure_model = lambda: shard(module, mesh)  # type: ignore[method-assign]

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what any number of ranks wrote; plain types only, whatever the caller asked for."""
        path = agreed(Path(checkpoint_path))
        require_same_kind(self, path)
        with values_only(path, "fsdp"):
            return super().load_checkpoint(path / SHARDS, weights_only=True)


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Divide the networks inside a LightningModule, each block of some size on its own; once.

    Args:
        module: its children are called as modules, an averaged copy through `.module`.
        mesh: one dimension, all ranks.
    """
    for child in module.children():
        root = child
        if isinstance(child, ModelEmaV3):
            root, child.foreach = child.module, False  # one operation cannot take sharded and whole tensors together
        if isinstance(root, FSDPModule) or _size(root) == 0:
            continue
        for part in list(root.modules()):
            if isinstance(part, (nn.Sequential, nn.ModuleList)):
                for block in part:
                    if _size(block) >= MIN_PARAMETERS:
                        fully_shard(block, mesh=mesh)
        fully_shard(root, mesh=mesh)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO, on CPUs too.

    Args:
        stage: 1 divides the optimizer state among all ranks, 2 the gradients too, 3 the parameters too.
        config: a DeepSpeed configuration or its path instead; accumulation and clipping come from the Trainer.
        process_group_backend: null takes nccl for GPUs and gloo for CPUs.

    Raises:
        ValueError: a configuration without a stage.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        config: str | dict[str, Any] | None = None,
        process_group_backend: str | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            _use_deepspeed_on_cpus()
            process_group_backend = process_group_backend or "gloo"
        super().__init__(stage=stage, config=config, process_group_backend=process_group_backend)
        assert isinstance(self.config, dict)
        require_stage(self.config)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def setup_environment(self) -> None:
        """Like DDP; Lightning's own refuses CPUs, which work."""
        if self.root_device.type == "cuda":
            super().setup_environment()
            return
        self.parallel_devices = [torch.device("cpu", index) for index in range(self.num_processes)]
        DDPStrategy.setup_environment(self)

    def setup(self, trainer: Trainer) -> None:
        """Refuse what would go wrong silently.

        Raises:
            ValueError: averaged weights under stage 3, or disks that are not there.
        """
        assert self.lightning_module is not None
        assert isinstance(self.config, dict)
        require_disks(self.config)
        if self.zero_stage_3 and any(isinstance(part, ModelEmaV3) for part in self.lightning_module.modules()):
            raise ValueError(
                "model.ema_decay needs whole weights at every step, which trainer.strategy zero3 divides; "
                "use --trainer.strategy fsdp2 or zero2, or --model.ema_decay null"
            )
        super().setup(trainer)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what any number of ranks wrote; plain types only, whatever the caller asked for."""
        path = agreed(Path(checkpoint_path))
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return self._load_for_evaluation(path)
        require_same_kind(self, path)
        if read_manifest(path).world_size == self.world_size:
            with values_only(path, "deepspeed"):
                return super().load_checkpoint(path / SHARDS)
        folder = Path(self.lightning_module.trainer.default_root_dir) / "checkpoints" / path.name
        universal = Path(self.broadcast(str(temporary(folder))))
        if self.is_global_zero:
            make_universal(path, universal)
        self.barrier("universal_checkpoint_made")
        state = self._load_universal(path, universal)
        self.barrier("universal_checkpoint_loaded")
        if self.is_global_zero:
            remove(universal)
        return state

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step, then log the norm of the gradients: DeepSpeed keeps them to itself and knows it only now."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        module, norm = self.lightning_module, self.deepspeed_engine.get_global_grad_norm()
        if module is not None and norm is not None and is_log_step(module.trainer):
            module.log(Tag.GRAD_NORM, float(norm))
        return result

    def _load_for_evaluation(self, path: Path) -> dict[str, Any]:
        checkpoint = load_plain(path)
        assert self.lightning_module is not None
        if self.zero_stage_3:
            self._restore_zero_state(checkpoint, strict=True)
        else:
            self.lightning_module.load_state_dict(checkpoint["state_dict"])
        return checkpoint

    def _load_universal(self, path: Path, universal: Path) -> dict[str, Any]:
        config, module = self.deepspeed_engine._config, self.lightning_module
        config.load_universal_checkpoint = True
        try:
            with values_only(path, "deepspeed"):
                state = super().load_checkpoint(universal)
        finally:
            config.load_universal_checkpoint = False
        assert module is not None
        restore_untrained(module, gather(path, "deepspeed")["state_dict"])
        return state


def restore_untrained(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load buffers and frozen parameters, which a universal checkpoint leaves as they are.

    Args:
        module: divided by DeepSpeed or whole.
        weights: of the whole module.
    """
    import deepspeed

    frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
        for name, value in (*frozen.items(), *module.named_buffers()):
            if name in weights and value.shape == weights[name].shape:
                value.copy_(weights[name])


def require_same_kind(strategy: Strategy, path: Path) -> None:
    """Refuse to continue a checkpoint under another kind of strategy: its optimizer state is divided otherwise.

    Raises:
        ValueError: naming both and the mend.
    """
    found, wanted = read_manifest(path).strategy, kind_of(strategy)
    if found != wanted:
        names = {"plain": "ddp or one device", "fsdp": "fsdp2", "deepspeed": "zero1, zero2 or zero3"}
        raise ValueError(
            f"checkpoint {path} was written under trainer.strategy {names[found]}, this is {names[wanted]}; continue "
            f"it under that one, or start a new run from its weights: mirrorla checkpoints {path} --convert "
            "OUT.safetensors, then --model.backbone.pretrained OUT.safetensors"
        )


def _use_deepspeed_on_cpus() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Reducing over shared memory would be compiled by every machine first (32 to 80 s); gloo is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
