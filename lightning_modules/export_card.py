"""What an exported file says about itself: as JSON inside the file, for programs, and as Markdown beside it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

_USE = {
    "onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({file!r}, providers=["CPUExecutionProvider"])
images = np.zeros((1, 3, {height}, {width}), np.float32)  # see Preprocessing
outputs = dict(zip({names}, session.run(None, {{"images": images}})))
""",
    "torch-export": """\
import torch

network = torch.export.load({file!r}).module()
images = torch.zeros(1, 3, {height}, {width})  # see Preprocessing
results = network(images)
outputs = dict(zip({names}, results if isinstance(results, (tuple, list)) else [results]))
""",
    "safetensors": """\
import torch
from lightning_modules.export_formats import read_safetensors

network = read_safetensors({file!r})[1]
images = torch.zeros(1, 3, {height}, {width})  # see Preprocessing
with torch.no_grad():
    outputs = dict(zip({names}, network(images)))
""",
}


@dataclass(frozen=True)
class ExportCard:
    """The identity of an exported file, in plain types.

    Attributes:
        format: "safetensors", "torch-export" or "onnx".
        task: "classification" and its siblings.
        backbone: variant name.
        num_classes: C.
        class_names: by class id, for detection by label - 1.
        weights: "averaged" or "trained".
        attention: kind of attention in each stage.
        mirror: options of the mirrors that are left, the static ones being part of the projections.
        input: shape of `images`, B of H x W pixels; numbers where a size is fixed.
        smallest_side: pixels of the smallest H and W.
        outputs: name -> shape.
        preprocessing: what turns a picture in [0, 1] into the input.
        checkpoint: name, step and epoch.
        metrics: of the checkpoint by name; empty where it was not ranked.
        dataset_digest: of the training data.
        commit: of the code that trained it.
        versions: of the packages that exported it.
        config: the run's resolved configuration as YAML.
    """

    format: str
    task: str
    backbone: str
    num_classes: int
    class_names: list[str]
    weights: str
    attention: list[str]
    mirror: dict[str, Any]
    input: list[str]
    smallest_side: int
    outputs: dict[str, list[str]]
    preprocessing: dict[str, Any]
    checkpoint: dict[str, Any]
    metrics: dict[str, float]
    dataset_digest: str | None
    commit: str | None
    versions: dict[str, str]
    config: str

    def to_json(self) -> str:
        """One line, the same for equal cards."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None, path: object) -> "ExportCard":
        """Read the card inside a file.

        Args:
            text: what stands there; None or "" where nothing does.
            path: names the file in errors.

        Raises:
            ValueError: it is none of `mirrorla export`'s, or of another version.
        """
        if not text:
            raise ValueError(f"{path} holds no card, so it was not written by `mirrorla export`; give a file that was")
        try:
            card = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds a card of another version ({error}); export it again") from None
        return card


def as_markdown(card: ExportCard, file: str, parity: str) -> str:
    """The card for people, with an example of use that runs as it stands beside the file.

    Args:
        card: of the file.
        file: its name.
        parity: how far its outputs are from the checkpoint's.
    """
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in card.metrics.items())
    rows = {
        "task": f"{card.task}, {card.num_classes} classes",
        "classes": ", ".join(card.class_names),
        "network": f"{card.backbone}, attention {' '.join(card.attention)}, {card.weights} weights",
        "mirrors left": json.dumps(card.mirror),
        "input `images`": f"({', '.join(card.input)}) float32, B from 1, H and W from {card.smallest_side}",
        **{f"output `{name}`": f"({', '.join(shape)}) float32" for name, shape in card.outputs.items()},
        "parity": parity,
        "checkpoint": ", ".join(f"{name} {value}" for name, value in card.checkpoint.items()),
        "metrics": metrics or "not among the ranked checkpoints of its run",
        "data digest": card.dataset_digest or "unknown",
        "commit": card.commit or "unknown",
        "exported with": ", ".join(f"{name} {value}" for name, value in card.versions.items()),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    steps = "\n".join(f"| {name} | {_cell(json.dumps(value))} |" for name, value in card.preprocessing.items())
    side = card.preprocessing.get("image_size") or 2 * card.smallest_side
    by_command = (
        f"`mirrorla predict {file} --data.path IMAGES`, or" if card.format != "torch-export" else "With PyTorch alone,"
    )
    use = _USE[card.format].format(file=file, height=side, width=side, names=list(card.outputs))
    return (
        f"# {file}\n\n| | |\n|---|---|\n{table}\n\n## Preprocessing\n\n"
        f"{_PREPROCESSING[card.task]}\n\n| | |\n|---|---|\n{steps}\n\n"
        f"## Use\n\n{_USES[card.task].format(by_command=by_command)}\n\n"
        f"```python\n{use}```\n\n## Configuration\n\n```yaml\n{card.config.rstrip()}\n```\n"
    )


_NORMALISE = "RGB in [0, 1], minus `mean`, divided by `std`."
_DENSE = f"Resize the shorter side to `short_side` (null: as it is), the longer at most `long_side`; {_NORMALISE}"
_PREPROCESSING = {
    "classification": "Resize the shorter side to `resize` and crop the centre of `image_size`; where `resize` is "
    f"null, resize the whole image to a square of `image_size`. {_NORMALISE}",
    "detection": _DENSE,
    "segmentation": _DENSE,
}
_USES = {
    "classification": "{by_command} without this package's commands:",
    "detection": "The backbone's maps. Anchors, proposals, non-maximum suppression and masks are not in this file: "
    "their sizes depend on what is found in an image. Detect with the checkpoint itself.",
    "segmentation": "{by_command} without this package's commands (resize the logits "
    "to the image, bilinear, then take the best class):",
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
