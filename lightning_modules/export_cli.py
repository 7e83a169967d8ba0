"""`mirrorla export CKPT --format F`: a trained network as a file that other programs run."""

from collections.abc import Sequence
from pathlib import Path

from lightning_modules import console
from lightning_modules.run_directory import named_checkpoint
from lightning_modules.verb_parser import VerbParser

FORMATS = ("safetensors", "torch-export", "onnx")
_DESCRIPTION = """\
Write a checkpoint's network as one file, with averaged weights where there are any and the static mirrors folded
into the projections, and a card (FILE.md) beside it: data digest, metrics, preprocessing, inputs, outputs, use.

  safetensors    weights, for a plain network of this package (--model.backbone.pretrained takes them, too)
  torch-export   a program for PyTorch alone; H and W from 33, or 32 alone for a classifier of such images. Loading one
                 can run code, so mirrorla predict takes the other two only
  onnx           a program for ONNX Runtime; needs pip install 'mirrorla[export]'

Images (B, 3, H, W) of any number and size, normalised as the card says. A classifier gives logits, a segmenter
logits at stride 4, a detector its backbone's maps: what follows them depends on what is found in an image.
Before the file gets its name it is read back and compared with the checkpoint at two batch sizes and two
resolutions; a relative error above 1e-4 refuses it."""
_EPILOG = """\
examples:
  mirrorla export runs/digits-classification --format onnx
  mirrorla export last --run_dir runs/digits-segmentation --format onnx --output segmenter.onnx
  mirrorla predict segmenter.onnx --data.path IMAGES

Exit codes: 2 for a command that cannot be carried out, 1 where the file would give other results."""


def run(verb: str, argv: Sequence[str]) -> int:
    """Export one checkpoint.

    Args:
        verb: "export".
        argv: the checkpoint and options.

    Returns:
        0.

    Raises:
        UsageError: options that cannot be carried out.
        ValueError: the checkpoint is damaged, or the file gives other results (exit code 1).
    """
    options = _parser(verb).parse_args(argv)
    console.quiet_libraries()
    console.speak(rank=0)
    try:
        chosen = named_checkpoint(options.checkpoint, options.run_dir)
        from lightning_modules.export import export

        export(chosen, options.format, options.output)
    finally:
        console.fall_silent()
    return 0


def _parser(verb: str) -> VerbParser:
    parser = VerbParser(verb, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a run, whose best or else newest is taken, a checkpoint; or best or last"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file, see above")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a new file; default RUN/export/<checkpoint>.<ending>"
    )
    parser.add_argument("--run_dir", type=Path, metavar="RUN", help="the run that best and last refer to")
    return parser
