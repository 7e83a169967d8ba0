"""What a configured model weighs: it is built, and a step of made-up samples sent through it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.plan import Sizes
from lightning_modules.dry_fit import build_data, build_model
from lightning_modules.probes import Probe, probe_of
from mirrorla.complexity import count_parameters

_WARM_UP, _TIMED = 2, 5
_BATCH = 2  # of one sample some norms learn nothing
_SMALL = ((128, 128), (256, 256))


def weigh(options: Any, *, calibrate: bool) -> Sizes:
    """Parameters, activations and, if wanted, speed of the configured model.

    Args:
        options: of dry_fit.parse.
        calibrate: whether to time a few steps on this machine's device.
    """
    model = build_model(options.model)
    probe = probe_of(model, getattr(build_data(options.data), "train_transform", None))
    if probe is None:
        classes = f"{options.model.class_path} and {options.data.class_path}"
        return Sizes(count_parameters(model), why_not=f"{classes} are not a pair of this project's")
    count = count_parameters(probe.network)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = activations_of(probe)
        if not calibrate:
            return Sizes(count, kept, probe.size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = torch.bfloat16 if "bf16" in str(options.trainer.precision) else torch.float32
        speed = samples_per_s(probe, device, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Sizes(count, kept, probe.size, speed, f"{name}, {str(precision).removeprefix('torch.')}")


def activations_of(probe: Probe) -> int:
    """Bytes that one of the largest training samples keeps; measured in float32 on this CPU.

    Where they are linear in the pixels two small sizes give the line, so that large images take no large memory here.
    """

    def kept(size: tuple[int, int]) -> int:
        cpu = torch.device("cpu")
        return activation_bytes(probe.network.train(), lambda: probe.step(_BATCH, size, cpu)) // _BATCH

    pixels = probe.size[0] * probe.size[1]
    (small, large), (few, many) = _SMALL, (side[0] * side[1] for side in _SMALL)
    if not probe.is_linear or pixels <= many:
        return kept(probe.size)
    below, above = kept(small), kept(large)
    return below + (above - below) * (pixels - few) // (many - few)


def activation_bytes(network: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, parameters left out.

    Args:
        network: whose parameters they are.
        step: takes the pass.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def samples_per_s(probe: Probe, device: torch.device, precision: torch.dtype) -> float:
    """Speed of forward and backward on one device, data already there.

    Args:
        probe: what is timed, at its largest size.
        device: where to measure.
        precision: of autocast; float32 for none.
    """
    network = probe.network.to(device).train()
    start_s = 0.0
    for step in range(_WARM_UP + _TIMED):
        if step == _WARM_UP:
            _wait(device)
            start_s = time.perf_counter()
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            loss = probe.step(probe.num_timed, probe.size, device)
        loss.backward()
        network.zero_grad()
    _wait(device)
    return _TIMED * probe.num_timed / (time.perf_counter() - start_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
