"""Plain data parallelism that rounds alike in every start, so that a resumed run is the uninterrupted one bit by bit.

DistributedDataParallel packs gradients into buckets in the order of the parameters, and after the first step anew in
the order in which gradients came. A sum over more than two ranks rounds by a value's place in its bucket, so the first
step after a resume would round otherwise than the same step of the run that went on.
"""

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


class SettledDDPStrategy(DDPStrategy):
    """Lightning's DDP with its buckets settled before the first step; `trainer.strategy: ddp` means this one.

    Args and behaviour are those of DDPStrategy. Costs one all-reduce of the gradients' size per start.
    """

    def configure_ddp(self) -> None:
        """Wrap the module, then settle its buckets."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        settle_buckets(self.model)


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let a wrapped module order its buckets by a backward pass of zeros, whose order is that of its parameters.

    It does so once in its life, so the order stays; that it is not the one in which real gradients come costs nothing
    but some overlap where modules are used in another order than they are listed.

    Args:
        ddp: just wrapped; its parameters have no gradients, and have none afterwards.
    """
    if ddp.find_unused_parameters:  # never ordered anew
        return
    learning = [parameter for parameter in ddp.module.parameters() if parameter.requires_grad]
    ddp.reducer.prepare_for_backward([])
    torch.stack([(parameter * 0).sum().float() for parameter in learning]).sum().backward()
    for parameter in learning:
        parameter.grad = None
