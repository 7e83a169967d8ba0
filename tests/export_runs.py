"""Shared by the tests of exported files: runs to export."""

import torch
import yaml

from lightning_modules.checkpoint import Score, step_path, write_scores
from lightning_modules.checkpoint_io import describe
from lightning_modules.export_source import TASKS, build
from lightning_modules.persist import Draft, commit_checkpoint
from lightning_modules.plain import snapshot, write_plain

CLASSES = {task.rpartition(".")[2].removesuffix("Module").lower(): task for task in TASKS}
HEADS = {
    "classification": {},
    "segmentation": {"head": {"channels": 16}},
    "detection": {"detector": {"kind": "retinanet", "channels": 16}},
}


def config_of(task, side=32, name="mirrorla_pico", **model):
    backbone = {"name": name, "drop_path_rate": 0.0}
    arguments = {"num_classes": 3, "backbone": backbone, "ema_decay": 0.9, **HEADS[task], **model}
    transform = {"image_size": side, "resize": None} if task == "classification" else {"short_side": None}
    return yaml.safe_dump(
        {
            "model": {"class_path": CLASSES[task], "init_args": arguments},
            "data": {"class_path": "unused", "init_args": {"eval_transform": {**transform, "std": [0.3, 0.2, 0.1]}}},
        }
    )


def save_run(root, config, step=5):
    """A run of one checkpoint whose trained and averaged weights, mirrors and norms all differ from their start."""
    torch.manual_seed(0)
    module, _ = build(config, "a test")
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.05 * torch.randn_like(value))
        for name, value in module.named_buffers():
            if name.endswith(("running_mean", "running_var", "running_rho")):
                value.add_(0.2 * torch.rand_like(value))
    module.class_names = ["a", "b", "c"]
    content = {"global_step": step, "epoch": 1, "state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    path = step_path(root / "checkpoints", step)
    path.parent.mkdir(parents=True)
    draft = Draft(path, describe(step, 1, None), beside={"config.yaml": config})
    commit_checkpoint(draft, lambda folder: write_plain(folder, snapshot(content)))
    write_scores(path.parent, "val/top1", [Score(step, 0.875)])
    return root
