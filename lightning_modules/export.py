"""Export a checkpoint: fold its mirrors, write the file, read it back, and publish it only if it computes the same."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.commit import commit_text, sync_directory, sync_file, temporary
from lightning_modules.errors import UsageError
from lightning_modules.export_card import ExportCard, as_markdown
from lightning_modules.export_formats import FORMATS, Format, Runner, fixed_side, runner
from lightning_modules.export_network import folded, folded_mirrors
from lightning_modules.export_source import (
    Source,
    class_names,
    exported_part,
    output_shapes,
    preprocessing_of,
    read_source,
)

TOLERANCE = 1e-4
"""Largest difference from the checkpoint's network, relative to the largest value of an output."""
_USUAL_SIDE, _LARGEST_SIDE = 128, 256
_log = logging.getLogger("mirrorla")


class ParityError(ValueError):
    """A written file computes something else than the network it was made from."""

    exit_code = 1


def export(checkpoint: Path, format: str, out: Path | None) -> Path:
    """Write a checkpoint's network as a file, and its card beside it.

    Args:
        checkpoint: a committed directory.
        format: one of FORMATS.
        out: a new file; None is export/<step><suffix> in the checkpoint's run.

    Returns:
        The file.

    Raises:
        UsageError: the format needs a package that is missing, or `out` has another ending or exists.
        ValueError: the checkpoint is damaged or of another kind.
        ParityError: what was written differs from the network.
    """
    form = FORMATS[format]
    form.require_packages()
    path = out or _default_path(checkpoint, form.suffix)
    _check_output(path, form.suffix)
    source = read_source(checkpoint)
    card = _card(source, format, form)
    _log.info("checkpoint     %s: %s", checkpoint, source.module.describe())
    network = folded(source.module.evaluated)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(temporary(path).name + form.suffix)  # some writers insist on the ending
    try:
        _log.info("writing        %s, %s weights", format, card.weights)
        form.write(network, card, new)
        _, written = form.read(new)
        parity = _compare(source, card, written)
        sync_file(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_directory(path.parent)
    commit_text(path.with_name(f"{path.name}.md"), as_markdown(card, path.name, parity))
    _log.info("exported       %s (%.1f MiB), card %s.md", path, path.stat().st_size / 2**20, path)
    return path


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two lists of outputs, each relative to its largest expected value.

    Returns:
        inf where shapes differ or a value is not finite.
    """
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)]
    return max(errors) if all(error < float("inf") for error in errors) else float("inf")


def parity_inputs(card: ExportCard) -> list[tuple[int, int, int, int]]:
    """Shapes to compare at: two batch sizes, the evaluation's resolution and, unless that is fixed, an odd one."""
    side = card.preprocessing.get("image_size") or card.preprocessing.get("short_side") or _USUAL_SIDE
    side = max(card.smallest_side, min(side, _LARGEST_SIDE))
    sizes = [(side, side), (side + 41, side + 7)] if fixed_side(card) is None else [(side, side)]
    return [(batch, 3, *size) for size in sizes for batch in (1, 3)]


def _compare(source: Source, card: ExportCard, written: Runner) -> str:
    """Run the network and the file on the same noise; give the sentence about it.

    Raises:
        ParityError: they differ by more than TOLERANCE.
    """
    network = runner(exported_part(source.module.evaluated.eval(), card.task))
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in parity_inputs(card):
        images = torch.randn(shape, generator=generator)
        error = relative_error(written(images), network(images))
        size = "x".join(map(str, shape))
        _log.info("parity         %-14s relative error %.1e", size, error)
        if not error <= TOLERANCE:
            raise ParityError(
                f"the {card.format} file gives other results than the checkpoint: relative error {error:.1e} for "
                f"images {size}, at most {TOLERANCE:.0e} is allowed; nothing was written, try another --format"
            )
        largest = max(largest, error)
    sizes = ", ".join("x".join(map(str, shape)) for shape in parity_inputs(card))
    return f"largest relative error {largest:.1e} against the checkpoint's network, for images {sizes}"


def _card(source: Source, name: str, form: Format) -> ExportCard:
    module, manifest = source.module, source.manifest
    preprocessing = preprocessing_of(source.transform)
    side = preprocessing.get("image_size", form.smallest_side)
    config = module.backbone_config
    mirror = folded_mirrors(config.mirror) if config.name.startswith("mirrorla_") else config.mirror
    return ExportCard(
        format=name,
        task=module.card.task,
        backbone=config.name,
        num_classes=module.num_classes,
        class_names=class_names(module),
        weights="trained" if module.ema is None else "averaged",
        attention=list(config.layout),
        mirror=asdict(mirror),
        input=["B", "3", *(["H", "W"] if side >= form.smallest_side else [str(side)] * 2)],
        smallest_side=min(side, form.smallest_side),
        outputs=output_shapes(module),
        preprocessing=preprocessing,
        checkpoint={"name": source.checkpoint.name, "step": manifest.step, "epoch": manifest.epoch},
        metrics=source.metrics,
        dataset_digest=manifest.dataset_digest,
        commit=manifest.git,
        versions={name: version(name) for name in ("mirrorla", "torch", *form.packages)},
        config=source.config,
    )


def _default_path(checkpoint: Path, suffix: str) -> Path:
    """In the run of a checkpoint, or beside one that was taken out of its run."""
    folder = checkpoint.resolve().parent
    root = folder.parent if folder.name == "checkpoints" else folder
    return root / "export" / f"{checkpoint.name}{suffix}"


def _check_output(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise UsageError(f"--output {path} must end in {suffix}")
    if path.exists():
        raise UsageError(f"--output {path} exists already; give another name, or remove it first")
