"""Small synthetic batches of the dense tasks: bright rectangles on noise, the class is the colour."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from mirrorla.dense import create_dense_backbone
from mirrorla.heads.detection import DetectorConfig, build_detector

COLOURS = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]])
SMALL = {"channels": 16, "anchors_per_image": 32, "proposals": 32, "regions_per_image": 16} | {
    "box_width": 32, "mask_width": 16, "mask_convs": 1,
}  # fmt: skip


def scene(seed, size=(64, 96), num_objects=3, with_masks=True):
    """An image (3, h, w) and its target in training form; objects do not overlap."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = torch.from_numpy(rng.normal(0, 0.1, (3, height, width)).astype(np.float32))
    boxes, labels, masks = [], [], []
    for column in rng.permutation(width // 32)[:num_objects].tolist():
        side = rng.integers(18, 28, 2)
        x, y = column * 32 + rng.integers(0, 32 - side[1]), rng.integers(0, height - side[0])
        box = [int(x), int(y), int(x + side[1]), int(y + side[0])]
        label = int(rng.integers(0, 3))
        image[:, box[1] : box[3], box[0] : box[2]] = COLOURS[label][:, None, None]
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        boxes.append(box)
        labels.append(label + 1)
        masks.append(mask)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        "image_id": torch.tensor(seed),
        "size": torch.tensor(size),
    }
    if with_masks:
        target["masks"] = torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)
    return image, target


def detection_batch(count=2, sizes=((64, 96), (96, 64)), **options):
    """A batch of the detection contract."""
    pairs = [scene(seed, sizes[seed % len(sizes)], **options) for seed in range(count)]
    return {
        "image": [image for image, _ in pairs],
        "target": [target for _, target in pairs],
        "weight": torch.ones(count),
        "id": torch.arange(count),
    }


def class_map_of(target, size):
    """0 = background, labels as they are."""
    mask = torch.zeros(size, dtype=torch.int64)
    for label, object_mask in zip(target["labels"], target["masks"], strict=True):
        mask[object_mask] = label
    return mask


def segmentation_batch(count=2, size=(64, 96)):
    """A batch of the segmentation contract, all of one size."""
    pairs = [scene(seed, size) for seed in range(count)]
    sizes = torch.tensor([size] * count)
    return {
        "image": torch.stack([image for image, _ in pairs]),
        "mask": torch.stack([class_map_of(target, size) for _, target in pairs]),
        "weight": torch.ones(count),
        "id": torch.arange(count),
        "size": sizes,
        "mask_size": sizes,
    }


def detector(kind, name="mirrorla_pico", num_classes=3, **options):
    """A small detector with reproducible weights."""
    torch.manual_seed(0)
    config = DetectorConfig(kind, **{**SMALL, **options})
    return build_detector(create_dense_backbone(name, strides=config.strides), num_classes, config)


def blank(batch, place):
    """The batch with one sample turned into what the data plane gives for a skipped one."""
    changed = {key: list(value) if isinstance(value, list) else value.clone() for key, value in batch.items()}
    changed["weight"][place], changed["id"][place] = 0, -1
    if "target" in batch:
        image, target = scene(0, (32, 32), num_objects=0)
        changed["image"][place], changed["target"][place] = torch.zeros_like(image), target
    else:
        changed["image"][place], changed["mask"][place] = 0, 255
    return changed


class Batches(LightningDataModule):
    """Serves ready batches as a data module of one rank."""

    def __init__(self, batches, num_classes=3, class_names=("red", "green", "blue")):
        super().__init__()
        self.batches, self.batch_size, self.batches_per_epoch = batches, len(batches[0]["id"]), len(batches)
        self.num_classes, self.class_names = num_classes, list(class_names)

    def _loader(self):
        return DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def trainer(folder, *callbacks, **options):
    """A quiet Trainer on the CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return Trainer(
        **{
            **(quiet | fixed),
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "plugins": [],
            **options,
        }
    )


def flat(value):
    """Everything in a batch as bytes, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value.numpy().tobytes() + str(value.shape).encode()]
    items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
    return [part for _, item in items for part in flat(item)]
