"""What TensorBoard's custom-scalars and HParams pages show of a run: pure functions from a task or a configuration."""

from collections.abc import Iterator
from typing import Any

import yaml

from lightning_modules.tensorboard import Tag

Layout = dict[str, dict[str, list[Any]]]
Setting = bool | int | float | str

_AP = {"box": Tag.VAL_BOX_AP, "mask": Tag.VAL_MASK_AP}
_QUALITY: dict[str, dict[str, list[str]]] = {
    "classification": {"top-1 and top-5": [Tag.VAL_TOP1, Tag.VAL_TOP5]},
    "detection": {
        **{f"{kind} AP": [tag, f"{tag}50", f"{tag}75"] for kind, tag in _AP.items()},
        **{
            f"{kind} AP of small, medium and large objects": [f"{tag}_{size}" for size in ("small", "medium", "large")]
            for kind, tag in _AP.items()
        },
        "matched by training": [f"{Tag.MATCHER}/.*"],
    },
    "segmentation": {
        "mean IoU and accuracy": [Tag.VAL_MIOU, Tag.VAL_PIXEL_ACCURACY, Tag.VAL_MEAN_ACCURACY],
        "IoU of the best and the worst class": ["val/iou_best", "val/iou_worst"],
    },
}
_TRAINER_SETTINGS = ("max_epochs", "max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val", "devices")
_WITHOUT_INFLUENCE = {
    *("path", "sources", "eval_batch_size", "num_workers", "worker_start", "timeout_s", "worker_memory_gib"),
    *("on_error", "max_skipped", "quarantine_dir", "allow_changed", "cache_dir", "cache_gib"),
}
"""Options of the data that decide where and how it is read, not what is learned."""


def scalars_layout(task: str) -> Layout:
    """Charts of the custom-scalars page: losses, the task's scores, where time goes.

    Args:
        task: classification, detection or segmentation.
    """
    charts: dict[str, dict[str, list[str]]] = {
        "losses": {
            "training and validation": [Tag.TRAIN_LOSS, Tag.VAL_LOSS],
            "terms": [f"{Tag.LOSS_TERM}/.*"],
        },
        task: _QUALITY[task],
        "time": {
            "waiting for data and checkpoints (the rest is computing)": [Tag.DATA_WAIT_SHARE, Tag.CHECKPOINT_STALL],
            "step time p50 and p95 [ms]": [Tag.STEP_P50_MS, Tag.STEP_P95_MS],
        },
    }
    return {
        category: {title: ["Multiline", [str(tag) for tag in tags]] for title, tags in titles.items()}
        for category, titles in charts.items()
    }


def result_tags(task: str) -> list[str]:
    """The scalars by which runs of a task are compared; the HParams page reads their latest values itself."""
    results: dict[str, list[str]] = {
        "classification": [Tag.VAL_TOP1, Tag.VAL_TOP5, Tag.VAL_LOSS],
        "detection": [f"{tag}{iou}" for tag in _AP.values() for iou in ("", "50", "75")],
        "segmentation": [Tag.VAL_MIOU, Tag.VAL_PIXEL_ACCURACY, Tag.VAL_MEAN_ACCURACY],
    }
    return [str(tag) for tag in (*results[task], Tag.TRAIN_LOSS)]


def hyperparameters(config: str) -> dict[str, Setting]:
    """The settings that decide what a run learns, by option name; nulls are left out, lists become text.

    Args:
        config: the resolved configuration as YAML.
    """
    document = yaml.safe_load(config) or {}
    model, data = (document.get(part) or {} for part in ("model", "data"))
    wanted = {"seed": document.get("seed_everything"), "model": model.get("init_args") or {}}
    wanted["data"] = {k: v for k, v in (data.get("init_args") or {}).items() if k not in _WITHOUT_INFLUENCE}
    trainer = document.get("trainer") or {}
    wanted["trainer"] = {name: trainer.get(name) for name in _TRAINER_SETTINGS}
    return dict(_leaves(wanted, ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Setting]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))
