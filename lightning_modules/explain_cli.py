"""`mirrorla explain CKPT IMAGE`: pictures of what the attention of a trained network does with an image."""

import logging
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules import console
from lightning_modules.errors import UsageError
from lightning_modules.run_directory import named_checkpoint
from lightning_modules.verb_parser import VerbParser

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from lightning_modules.export_source import Source

_log = logging.getLogger("mirrorla")
PLACES = ((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7))
_DESCRIPTION = """\
Draw what a trained network's attention does with an image, two pictures for each:

  <image>.attention.png   where chosen query tokens look, in the last layer of every stage
  <image>.mirrors.png     for every head of every mirror layer, the energy that ReLU keeps and the angles for this
                          image: trained, and as the same seed starts"""
_EPILOG = """\
examples:
  mirrorla explain runs/digits-classification digit.png
  mirrorla explain best --run_dir runs/digits-segmentation scene.png --query 0.5,0.5 --query 0.2,0.8"""


def run(verb: str, argv: Sequence[str]) -> int:
    """Explain images.

    Args:
        verb: "explain".
        argv: the checkpoint, images and options.

    Returns:
        0.

    Raises:
        UsageError: options that cannot be carried out, an image that cannot be read, a network without such attention.
        ValueError: the checkpoint is damaged.
    """
    options = _parser(verb).parse_args(argv)
    console.quiet_libraries()
    console.speak(rank=0)
    try:
        chosen = named_checkpoint(options.checkpoint, options.run_dir)
        pictures = {path: _opened(path) for path in options.images}
        _explain(chosen, pictures, options.queries or list(PLACES), options.output or chosen.parents[1] / "explain")
    finally:
        console.fall_silent()
    return 0


def _explain(checkpoint: Path, pictures: dict[Path, "Image"], places: list[tuple[float, float]], folder: Path) -> None:
    from datamodules.transforms import denormalise
    from lightning_modules.explain import attention_figure, look, mirrors_figure
    from lightning_modules.export_source import read_source

    source = read_source(checkpoint)
    trained, fresh = _networks(source)
    folder.mkdir(parents=True, exist_ok=True)
    for path, picture in pictures.items():
        image = _seen(picture, source.transform)
        views = look(trained, image, places)
        if not views:
            raise UsageError(f"{checkpoint} has no attention over a grid of tokens: nothing to explain")
        shown = denormalise(image, source.transform.mean, source.transform.std)
        pixels = (shown.permute(1, 2, 0) * 255).byte().numpy()
        figures = {"attention": attention_figure(pixels, places, views)}
        mirrors = [[view for view in found if view.has_mirrors] for found in (look(fresh, image, places), views)]
        if mirrors[1]:
            figures["mirrors"] = mirrors_figure(*mirrors)
        for name, figure in figures.items():
            file = folder / f"{path.stem}.{name}.png"
            figure.savefig(file)
            _log.info("%-14s %s", name, file)


def _networks(source: "Source") -> tuple["nn.Module", "nn.Module"]:
    """The part of the checkpoint's network that sees images, and the same one with the first weights of its seed."""
    import torch
    import yaml

    from lightning_modules.export_source import build, exported_part

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(yaml.safe_load(source.config).get("seed_everything") or 0))
        fresh, _ = build(source.config, source.checkpoint)
    task = source.module.card.task
    return exported_part(source.module.evaluated, task), exported_part(fresh.evaluated, task)


def _seen(picture: "Image", transform: Any) -> "Tensor":
    """An image as an evaluation sees it: (3, H, W), normalised."""
    from datamodules.transforms import EvalTransform, channels, eval_pipeline, normalise
    from datamodules.views import View, fitted

    if isinstance(transform, EvalTransform):
        return eval_pipeline(transform)(picture)
    view = View(picture, None)
    if transform.short_side is not None:
        view = view.resized(fitted(view.size, transform.short_side, transform.long_side), transform.interpolation)
    return normalise(view.image, channels(transform.mean), channels(transform.std))


def _opened(path: Path) -> "Image":
    from datamodules.decode import decode_image
    from datamodules.types import DataError

    try:
        return decode_image(path.read_bytes(), str(path))
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"image {path} cannot be read: {reason}") from None


def _place(text: str) -> tuple[float, float]:
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no Y,X such as 0.5,0.25") from None
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ArgumentTypeError(f"{text!r} must lie in 0 … 1: shares of the image's height and width")
    return y, x


def _parser(verb: str) -> VerbParser:
    parser = VerbParser(verb, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a run, whose best or else newest is taken, a checkpoint; or best or last"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument(
        "--query", dest="queries", metavar="Y,X", type=_place, action="append",
        help="place of a query token as shares of height and width, may be repeated; default: four places",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the pictures; default RUN/explain")
    parser.add_argument("--run_dir", type=Path, metavar="RUN", help="the run that best and last refer to")
    return parser
