"""The checkpoint that is exported: its network built from its own configuration, its weights, and what is known of it.

Nothing in a checkpoint chooses code: its configuration names one of three tasks, and its weights are plain tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from datamodules.transforms import EvalTransform
from datamodules.transforms_detection import DetectionEvalTransform
from datamodules.transforms_segmentation import SegmentationEvalTransform
from lightning_modules.checkpoint import load_plain, read_manifest, read_scores
from lightning_modules.classification import ClassificationModule
from lightning_modules.detection import DetectionModule
from lightning_modules.manifest import Manifest
from lightning_modules.parser import OneLineParser
from lightning_modules.segmentation import SegmentationModule

Trained = ClassificationModule | DetectionModule | SegmentationModule
TASKS: dict[str, tuple[type[Trained], type]] = {
    "lightning_modules.classification.ClassificationModule": (ClassificationModule, EvalTransform),
    "lightning_modules.detection.DetectionModule": (DetectionModule, DetectionEvalTransform),
    "lightning_modules.segmentation.SegmentationModule": (SegmentationModule, SegmentationEvalTransform),
}


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        checkpoint: its directory.
        manifest: what it says about itself.
        module: the training module with the checkpoint's weights.
        transform: of the images an evaluation sees.
        config: the resolved configuration as YAML.
        metrics: of the run's ranking, by name.
    """

    checkpoint: Path
    manifest: Manifest
    module: Trained
    transform: Any
    config: str
    metrics: dict[str, float]


def read_source(checkpoint: Path) -> Source:
    """Build the network of a checkpoint and load its weights.

    Args:
        checkpoint: a committed directory.

    Raises:
        ValueError: it is damaged, holds objects that would run code, or has no configuration of this project.
    """
    content = load_plain(checkpoint)
    place = checkpoint / "config.yaml"
    if not place.is_file():
        raise ValueError(
            f"checkpoint {checkpoint} holds no config.yaml, so its network is unknown; export one of a run"
        )
    config = place.read_text()
    module, transform = build(config, place)
    module.on_load_checkpoint(content)
    load_weights(module, content["state_dict"], checkpoint)
    manifest = read_manifest(checkpoint)
    return Source(checkpoint, manifest, module, transform, config, _metrics(checkpoint.parent, manifest.step))


def build(config: str, place: object, mirror: Mapping[str, Any] | None = None) -> tuple[Trained, Any]:
    """Build the module and the evaluation transform that a resolved configuration describes.

    Args:
        config: YAML with model and data.
        place: where it stands, for errors.
        mirror: takes the place of the configuration's mirrors, in a module without averaged copy.

    Raises:
        ValueError: it is no such configuration; the class or key at fault is named.
    """
    try:
        content = yaml.safe_load(config)
        model, data = (content[key] for key in ("model", "data"))
        path, arguments = str(model["class_path"]), dict(model["init_args"])
        backbone = {**arguments.get("backbone", {}), "pretrained": None}  # the weights come from the checkpoint
        transform = data["init_args"].get("eval_transform") or {}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{place} is no configuration of a run ({type(error).__name__})") from None
    if path not in TASKS:
        raise ValueError(f"{place}: model {path!r} cannot be exported; the modules are {', '.join(TASKS)}")
    if mirror is not None:
        backbone["mirror"] = dict(mirror)
        arguments["ema_decay"] = None
    cls, transform_cls = TASKS[path]
    parser = OneLineParser()
    parser.add_class_arguments(cls, "model")
    parser.add_class_arguments(transform_cls, "eval_transform")
    parsed = parser.parse_object({"model": {**arguments, "backbone": backbone}, "eval_transform": transform})
    built = parser.instantiate(parsed)
    return built.model.eval(), built.eval_transform


def load_weights(module: nn.Module, weights: Mapping[str, Any], place: object) -> None:
    """Load every weight or none.

    Raises:
        ValueError: they are another network's.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{place} holds weights of another network than its configuration builds: {reason}") from None


def exported_part(network: nn.Module, task: str) -> nn.Module:
    """What of an evaluated network an exported program runs: all of it, of a detector the backbone."""
    if task != "detection":
        return network
    trunk: nn.Module = network.backbone.trunk  # type: ignore[union-attr, assignment]
    return trunk


def output_shapes(module: Trained) -> dict[str, list[str]]:
    """Names of the outputs and their shapes for images (B, 3, H, W)."""
    if isinstance(module, ClassificationModule):
        return {"logits": ["B", str(module.num_classes)]}
    if isinstance(module, SegmentationModule):
        return {"logits": ["B", str(module.num_classes), "ceil(H/4)", "ceil(W/4)"]}
    trunk = module.backbone
    pairs = zip(trunk.channels, trunk.strides, strict=True)
    return {f"map_{stride}": ["B", str(width), f"ceil(H/{stride})", f"ceil(W/{stride})"] for width, stride in pairs}


def preprocessing_of(transform: Any) -> dict[str, Any]:
    """An evaluation transform in JSON's types."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(transform)))
    return found


def class_names(module: Trained) -> list[str]:
    """Class names of a module; numbers where it knows none."""
    names: list[str] = module.class_names
    return list(names) or [str(number) for number in range(module.num_classes)]


def _metrics(folder: Path, step: int) -> dict[str, float]:
    """What the run's ranking knows about a step."""
    values = {score.step: score.value for score in read_scores(folder)}
    if step not in values:
        return {}
    return {str(json.loads((folder / "best.json").read_text())["metric"]): values[step]}
