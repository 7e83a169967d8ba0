"""The three formats of an export: how a file is written, how it is read back, and the package that runs it.

    safetensors    weights, for a plain network of this package
    torch-export   a program for PyTorch alone
    onnx           a program for ONNX Runtime and its like

Every reader gives a function from images (B, 3, H, W) to a tuple of outputs, on the CPU.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_modules.errors import UsageError
from lightning_modules.export_card import ExportCard
from lightning_modules.export_network import portable
from lightning_modules.export_source import build, exported_part, load_weights

Runner = Callable[[Tensor], tuple[Tensor, ...]]
SMALLEST_SIDE, SMALLEST_TRACED = 32, 33
_CARD = "mirrorla"
_EXAMPLE = (2, 3, 64, 96)  # cheap to trace; every size differs from the others, so that none is taken for another


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffix: of its files.
        write: folded network, task, card and path -> nothing.
        read: path -> card and runner.
        packages: what it needs beside this project's own dependencies.
        is_data: whether reading a stranger's file is safe; torch.export.load evaluates and unpickles what is inside.
        smallest_side: pixels of the smallest image; smaller ones need a fixed size.
    """

    suffix: str
    write: Callable[[nn.Module, ExportCard, Path], None]
    read: Callable[[Path], tuple[ExportCard, Runner]]
    packages: tuple[str, ...] = ()
    is_data: bool = True
    smallest_side: int = SMALLEST_SIDE

    def require_packages(self) -> None:
        """Refuse a format whose packages are not installed.

        Raises:
            UsageError: naming the package and the command that installs it.
        """
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise UsageError(f"this format needs {package}; pip install 'mirrorla[export]'")


def write_safetensors(network: nn.Module, card: ExportCard, path: Path) -> None:
    """Write a folded network's weights, with its card as metadata."""
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, {"format": "pt", _CARD: card.to_json()})


def read_safetensors(path: Path | str) -> tuple[ExportCard, Runner]:
    """Build a plain network from a file's card and load its weights.

    Raises:
        ValueError: the file is damaged or not of `mirrorla export`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_CARD)
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as tensors: {error}") from None
    card = ExportCard.from_json(text, path)
    has_mirrors = card.backbone.startswith("mirrorla_")
    module, _ = build(card.config, f"the card of {path}", card.mirror if has_mirrors else None)
    load_weights(module.evaluated, weights, path)
    return card, runner(exported_part(module.evaluated, card.task))


def write_torch_export(network: nn.Module, card: ExportCard, path: Path) -> None:
    """Write a program of PyTorch's own operators, with its card as a file of the archive."""
    program = traced(exported_part(network, card.task), fixed_side(card))
    torch.export.save(program, path, extra_files={_CARD: card.to_json()})


def read_torch_export(path: Path | str) -> tuple[ExportCard, Runner]:
    """Load a program, which may run code: only one that was just written.

    Raises:
        ValueError: the file is damaged or not of `mirrorla export`.
    """
    extra = {_CARD: ""}
    try:
        with _quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # foreign bytes fail anywhere inside a parser
        raise ValueError(f"{path} cannot be read as a program of torch.export: {_first_line(error)}") from None
    return ExportCard.from_json(extra[_CARD], path), runner(program.module())


def write_onnx(network: nn.Module, card: ExportCard, path: Path) -> None:
    """Write an ONNX model, with its card in the model's metadata."""
    program = traced(exported_part(network, card.task))
    with _quiet():
        made = torch.onnx.export(
            program, input_names=["images"], output_names=list(card.outputs), dynamo=True, verbose=False
        )
    assert made is not None
    made.model.metadata_props[_CARD] = card.to_json()
    made.save(str(path))


def read_onnx(path: Path | str) -> tuple[ExportCard, Runner]:
    """Open a session of ONNX Runtime on the CPU.

    Raises:
        ValueError: the file is damaged or not of `mirrorla export`.
    """
    FORMATS["onnx"].require_packages()
    runtime = importlib.import_module("onnxruntime")  # optional, so nothing may import it at the head of a file
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base of their own
        raise ValueError(f"{path} cannot be read by ONNX Runtime: {_first_line(error)}") from None
    text = session.get_modelmeta().custom_metadata_map.get(_CARD)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()}))

    return ExportCard.from_json(text, path), run


FORMATS = {
    "safetensors": Format(".safetensors", write_safetensors, read_safetensors),
    "torch-export": Format(".pt2", write_torch_export, read_torch_export, is_data=False, smallest_side=SMALLEST_TRACED),
    "onnx": Format(".onnx", write_onnx, read_onnx, ("onnx", "onnxruntime", "onnxscript")),
}


def format_of(path: Path) -> Format | None:
    """The format whose files end as this one."""
    return next((form for form in FORMATS.values() if form.suffix == path.suffix), None)


def runner(network: Any) -> Runner:
    """A network as a function without gradients whose outputs are always a tuple."""

    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = network(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run


def fixed_side(card: ExportCard) -> int | None:
    """Height and width of the images where they are fixed; None where any will do."""
    return None if card.input[2] == "H" else int(card.input[2])


def traced(network: nn.Module, side: int | None = None) -> ExportedProgram:
    """The program of a folded network, for any number of images.

    Args:
        network: images (B, 3, H, W) -> one or several tensors.
        side: fixed height and width; None is any from 33, for torch takes a last map of a single cell as another case.
    """
    sizes: dict[int, Any] = {0: Dim("batch")}
    if side is None:
        sizes |= {place: Dim(name, min=SMALLEST_TRACED) for place, name in ((2, "height"), (3, "width"))}
    images = torch.zeros(_EXAMPLE if side is None else (*_EXAMPLE[:2], side, side))
    with _quiet():
        return torch.export.export(portable(network), (images,), dynamic_shapes=(sizes,), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress and deprecations, about which a user can do nothing."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
