"""Every head can learn: eight images to an AP50 or mIoU above .95."""

import gc

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules.backbone import BackboneConfig
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.detection import DetectionModule
from lightning_modules.optim import OptimConfig
from lightning_modules.segmentation import SegmentationModule
from mirrorla.heads.detection import DetectorConfig
from mirrorla.heads.segmentation import SegmenterConfig
from tests.dense_batches import SMALL, Batches, detection_batch, segmentation_batch, trainer

# The loaders of these tests need no workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
BACKBONE = BackboneConfig("mirrorla_pico", drop_path_rate=0.0)


def overfitted(tmp_path, module, data, steps, seed=0):
    """Metrics after so many steps on the same eight images."""
    fit = trainer(tmp_path, StepSeed(seed), max_epochs=steps, check_val_every_n_epoch=steps, gradient_clip_val=1.0)
    fit.fit(module, datamodule=data)
    return {name: float(value) for name, value in fit.callback_metrics.items()}


def optim(lr):
    return OptimConfig(lr=lr, weight_decay=0.0, warmup_steps=5, min_lr=1e-4)


@pytest.mark.parametrize("kind", ["semantic_fpn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_segmenters_learn_eight_images(tmp_path, kind):
    torch.manual_seed(0)
    module = SegmentationModule(4, BACKBONE, SegmenterConfig(kind, 32, auxiliary_channels=16), optim(5e-3))
    data = Batches([segmentation_batch(8, (32, 64))], 4, ("background", "red", "green", "blue"))
    assert overfitted(tmp_path, module, data, 90)["val/miou"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_detectors_learn_eight_images(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {**SMALL, "channels": 32, "box_width": 64, "regions_per_image": 32, "mask_width": 32, "mask_convs": 2}
    sizes["anchor_scale"] = {"retinanet": 3.0, "mask_rcnn": 6.0}[kind]  # objects of 18 to 28 pixels
    module = DetectionModule(3, BACKBONE, DetectorConfig(kind, **sizes), optim(3e-3))
    metrics = overfitted(tmp_path, module, Batches([detection_batch(8)]), 200)
    assert metrics["val/box_ap50"] > 0.95
    if kind == "mask_rcnn":
        assert metrics["val/mask_ap50"] > 0.95


def live_bytes():
    """Of all tensors that something still refers to."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]  # isinstance wakes lazy objects
    return sum(x.numel() * x.element_size() for x in found)


class LiveBytes(Callback):
    """What is alive before every fiftieth step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % 50 == 10:
            self.seen.append(live_bytes())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the averaged copy, on purpose
@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "upernet"])
def test_two_hundred_steps_keep_nothing(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "upernet":
        module = SegmentationModule(4, BACKBONE, SegmenterConfig(kind, 32), optim(1e-3), ema_decay=0.9)
        data = Batches([segmentation_batch(2, (64, 64 + 32 * i)) for i in range(3)], 4, "wxyz")
    else:
        module = DetectionModule(3, BACKBONE, DetectorConfig(kind, **SMALL), optim(1e-3), ema_decay=0.9)
        data = Batches([detection_batch(2, ((64, 64 + 32 * i),)) for i in range(3)])
    fit = trainer(tmp_path, kept := LiveBytes(), max_epochs=-1, max_steps=220, limit_val_batches=0)
    fit.fit(module, datamodule=data)
    assert len(kept.seen) == 5
    # gradients are there or not, batches differ in size: nothing may come on top of that from one look to the next
    assert max(kept.seen[1:]) - min(kept.seen[1:]) < 1 << 20
