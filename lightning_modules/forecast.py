"""What a configured model weighs: parsed as `fit` parses it, built, and one small batch sent through it."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from cluster.plan import Sizes
from lightning_modules import config_checks, console
from lightning_modules.classification import ClassificationModule
from lightning_modules.training_cli import Request, TrainingCLI
from mirrorla.complexity import count_parameters

_WARM_UP, _TIMED = 2, 5
_BATCH = 2
_CALIBRATION_BATCH = 16


class _Parsed(Exception):  # noqa: N818 - carries the result out of a constructor that would go on to train
    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options


class _ParseOnly(TrainingCLI):
    """Everything that `fit` refuses about a configuration, and nothing of what it does afterwards."""

    def _set_seed(self) -> None:
        """The caller's randomness is not this command's."""

    def before_instantiate_classes(self) -> None:
        raise _Parsed(self.config["fit"])


def parse(argv: Sequence[str]) -> Any:
    """The options of `fit`, checked.

    Raises:
        UsageError: a configuration that cannot be run: an unknown key (the nearest is named), a wrong type, ….
    """
    console.quiet_libraries()
    with ExitStack() as closing:
        try:
            _ParseOnly(Request("fit", *config_checks.expand_configs(argv)), closing)
        except _Parsed as parsed:
            return parsed.options
    raise AssertionError("the parser does not stop before it builds")


def weigh(argv: Sequence[str], *, calibrate: bool) -> Sizes:
    """Parameters, activations and, if wanted, speed of the configured model.

    Args:
        argv: options of `fit`.
        calibrate: whether to time a few steps on this machine's device.

    Raises:
        UsageError: a configuration that cannot be run.
    """
    options = parse(argv)
    model = _build(options.model)
    network = model.backbone if isinstance(model, ClassificationModule) else model
    count = count_parameters(network)
    transform = options.data.init_args.get("train_transform")
    size = getattr(transform, "image_size", None)
    if not isinstance(model, ClassificationModule) or size is None:
        return Sizes(count)  # scenes have no one size: nothing honest to say about them
    kept = activation_bytes(network.train(), torch.zeros(_BATCH, 3, size, size)) // _BATCH
    if not calibrate:
        return Sizes(count, kept)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if "bf16" in str(options.trainer.precision) else torch.float32
    speed = samples_per_s(network, size, device, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Sizes(count, kept, speed, f"{name}, {str(precision).removeprefix('torch.')}, {size} pixels")


def activation_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, parameters left out.

    Args:
        network: images -> anything.
        images: (B, 3, H, W).
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def samples_per_s(network: nn.Module, size: int, device: torch.device, precision: torch.dtype) -> float:
    """Speed of forward and backward on one device, data already there.

    Args:
        network: images -> logits.
        size: side of the images in pixels.
        device: where to measure.
        precision: of autocast; float32 for none.
    """
    network, images = network.to(device), torch.randn(_CALIBRATION_BATCH, 3, size, size, device=device)
    start_s = 0.0
    for step in range(_WARM_UP + _TIMED):
        if step == _WARM_UP:
            _wait(device)
            start_s = time.perf_counter()
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            loss = network(images).float().square().mean()
        loss.backward()
        network.zero_grad()
    _wait(device)
    return _TIMED * _CALIBRATION_BATCH / (time.perf_counter() - start_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build(options: Any) -> LightningModule:
    """The module alone, without the weights it may start from and without its averaged copy."""
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    written = options.as_dict()
    arguments = written["init_args"]
    arguments["ema_decay"] = None
    if isinstance(arguments.get("backbone"), dict):
        arguments["backbone"]["pretrained"] = None
    model: LightningModule = parser.instantiate_classes(parser.parse_object({"model": written})).model
    return model
