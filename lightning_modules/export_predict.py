"""`mirrorla predict FILE --data.path IMAGES`: an exported file in the checkpoint's place, with the same results."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from datamodules.module import ClassificationDataModule
from datamodules.segmentation import SegmentationDataModule
from datamodules.transforms import EvalTransform
from datamodules.transforms_segmentation import SegmentationEvalTransform
from lightning_modules import console
from lightning_modules.callbacks.predictions import WritePredictions
from lightning_modules.callbacks.progress import EpochLines
from lightning_modules.errors import UsageError
from lightning_modules.export_card import ExportCard
from lightning_modules.export_formats import Runner, format_of
from lightning_modules.run_directory import RunDirectory
from mirrorla.heads.segmentation import class_map

_log = logging.getLogger("mirrorla")
_DATA: dict[str, tuple[type[LightningDataModule], type]] = {
    "classification": (ClassificationDataModule, EvalTransform),
    "segmentation": (SegmentationDataModule, SegmentationEvalTransform),
}


class ExportedModule(LightningModule):
    """An exported file as Lightning sees a model that predicts.

    Args:
        card: of the file.
        network: the file.
    """

    def __init__(self, card: ExportCard, network: Runner) -> None:
        super().__init__()
        self.class_names, self.num_classes = card.class_names, card.num_classes
        self._network = network
        self._predict = {"classification": self._classify, "segmentation": self._segment}[card.task]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """What the checkpoint's module gives for the same batch, looking once at every image."""
        return {"id": batch["id"], "weight": batch["weight"], **self._predict(batch)}

    def _classify(self, batch: Any) -> dict[str, Any]:
        (logits,) = self._network(batch["image"].contiguous())
        scores, classes = logits.softmax(1).topk(min(5, self.num_classes))
        return {"classes": classes, "scores": scores}

    def _segment(self, batch: Any) -> dict[str, Any]:
        rows = zip(batch["image"], batch["size"].tolist(), batch["mask_size"].tolist(), strict=True)
        return {"predictions": [self._map(image[:, :height, :width], tuple(to)) for image, (height, width), to in rows]}

    def _map(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        (logits,) = self._network(image[None].contiguous())
        return class_map([logits], size)


def run(argv: Sequence[str]) -> int:
    """Predict a folder of images with an exported file, on the CPU.

    Args:
        argv: the file and options.

    Returns:
        0.

    Raises:
        UsageError: options that cannot be carried out, or a file whose outputs are no predictions.
        ValueError: the file is damaged or not of `mirrorla export`.
    """
    options = _options(argv)
    form = format_of(options.file)
    assert form is not None, "the caller looked at the ending"
    if not form.is_data:
        raise UsageError(
            f"{options.file} is a program, and loading one can run code that somebody put into it; "
            "predict with an .onnx or .safetensors file, or load your own with torch.export.load"
        )
    if not options.file.is_file():
        raise UsageError(f"{options.file} does not exist; write it with mirrorla export")
    form.require_packages()
    console.quiet_libraries()
    console.speak(rank=0)
    try:
        card, network = form.read(options.file)
        if card.task not in _DATA:
            raise UsageError(f"{options.file} holds the backbone of a {card.task} network; predict with its checkpoint")
        _predict(card, network, options)
    finally:
        console.fall_silent()
    return 0


def _predict(card: ExportCard, network: Runner, options: Namespace) -> None:
    directory = RunDirectory(options.run_dir or Path("runs") / options.file.stem)
    data_cls, transform_cls = _DATA[card.task]
    transform = transform_cls(**card.preprocessing)
    data = data_cls(
        options.path, eval_transform=transform, eval_batch_size=options.batch_size, num_workers=options.num_workers
    )
    directory.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(directory.root),
        callbacks=[WritePredictions(directory, card.task), EpochLines()],
    )
    _log.info("model          %s: %s %s", options.file, card.backbone, card.task)
    trainer.predict(ExportedModule(card, network), datamodule=data, return_predictions=False)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see mirrorla predict FILE --help")


def _options(argv: Sequence[str]) -> Namespace:
    text = "Predict a folder of images with a file of mirrorla export; files as predict leaves them, in --run_dir."
    parser = _Parser(prog="mirrorla predict", description=text, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", type=Path, help="an .onnx or .safetensors file of mirrorla export")
    parser.add_argument("--data.path", dest="path", required=True, metavar="IMAGES", help="a folder of images")
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="of the predictions; default runs/<FILE's name>")
    parser.add_argument("--data.eval_batch_size", dest="batch_size", type=int, default=16, metavar="N", help="images")
    parser.add_argument("--data.num_workers", dest="num_workers", type=int, default=0, metavar="N", help="processes")
    return parser.parse_args(argv)
