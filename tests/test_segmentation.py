"""The segmentation module: weights of samples, exact evaluation, windows and views, checkpoints."""

import re

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules.backbone import BackboneConfig
from lightning_modules.optim import OptimConfig
from lightning_modules.segmentation import SegmentationModule, WindowConfig
from lightning_modules.views import ViewConfig
from mirrorla.heads.segmentation import SegmenterConfig
from tests.dense_batches import Batches, blank, segmentation_batch, trainer

# The averaged copy and frozen stages stay in evaluation mode on purpose; these loaders need no workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
KINDS = ("semantic_fpn", "upernet")
NAMES = ("background", "red", "green", "blue")
STILL = OptimConfig(lr=1e-30, schedule="constant", weight_decay=0.0)


def module(kind="semantic_fpn", name="mirrorla_pico", num_classes=4, dropout=0.0, **options):
    torch.manual_seed(0)
    head = SegmenterConfig(kind, channels=32, dropout=dropout, auxiliary_channels=16)
    return SegmentationModule(num_classes, BackboneConfig(name), head, **{"optim": STILL, **options})


def data(*batches):
    return Batches(list(batches), 4, NAMES)


def gradients(tmp_path, batch, kind="upernet", name="mirrorla_pico"):
    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.of = {key: p.grad.clone() for key, p in pl_module.network.named_parameters()}

    fit = trainer(tmp_path, kept := Keep(), max_steps=1, limit_val_batches=0)
    fit.fit(module(kind, name), datamodule=data(batch))
    return kept.of


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_sample_changes_no_gradient_but_its_share(tmp_path, kind):
    batch = segmentation_batch(3)
    without = {key: value[:2] for key, value in batch.items()}
    found, wanted = gradients(tmp_path, blank(batch, 2), kind), gradients(tmp_path, without, kind)
    for name, gradient in found.items():
        # Of the whole tensor: a convolution sums a batch of another size in another order, and single sums nearly cancel.
        expected = wanted[name] * 2 / 3
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_batch_of_skipped_samples_gives_zero_gradients(tmp_path):
    found = gradients(tmp_path, blank(blank(segmentation_batch(2), 0), 1))
    assert all(not gradient.any() for gradient in found.values())


def test_uneven_shares_add_up_to_the_gradient_of_the_global_batch(tmp_path):
    batch = segmentation_batch(3)
    parts = [{key: value[chosen] for key, value in batch.items()} for chosen in (slice(0, 2), slice(2, 3))]
    for part in parts:  # N b / B
        part["weight"] = torch.full_like(part["weight"], 2 * len(part["id"]) / 3)
    whole = gradients(tmp_path, batch, name="test_convnext")  # without BatchNorm
    ranks = [gradients(tmp_path, part, name="test_convnext") for part in parts]
    for name, gradient in whole.items():
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, gradient, rtol=1e-3, atol=1e-6)


def test_loss_is_the_head_and_its_share_of_the_auxiliary(tmp_path):
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(module("upernet"), datamodule=data(segmentation_batch(2)))
    metrics = fit.callback_metrics
    torch.testing.assert_close(metrics["train/loss"], metrics["loss/head"] + 0.4 * metrics["loss/auxiliary"])


def padded(batch, size):
    """The batch as evaluation gives it: every image in the corner of a larger one."""
    images = torch.zeros(len(batch["id"]), 3, *size)
    images[:, :, : batch["image"].shape[2], : batch["image"].shape[3]] = batch["image"]
    return {**batch, "image": images}


@pytest.mark.parametrize(
    "options",
    [{}, {"window": WindowConfig(48, 32)}, {"views": ViewConfig(flip=True, scales=(0.75, 1.0))}],
    ids=["whole", "window", "views"],
)
def test_class_maps_do_not_depend_on_padding_or_batch(options):
    net = module("upernet", **options)
    batch = segmentation_batch(2, (61, 90))
    mask_sizes = torch.tensor([[122, 180], [61, 90]])
    plain = net.segment(batch["image"], batch["size"], mask_sizes)
    assert net.network.training  # the mode came back
    within = net.segment(padded(batch, (64, 128))["image"], batch["size"], mask_sizes)
    alone = net.segment(batch["image"][1:], batch["size"][1:], mask_sizes[1:])
    assert [tuple(x.shape) for x in plain] == [(122, 180), (61, 90)]
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))
    assert torch.equal(plain[1], alone[0]) and plain[0].dtype == torch.int64


def test_mirrored_views_mirror():
    net = module(views=ViewConfig(flip=True))
    batch = segmentation_batch(1, (64, 96))  # 96 divides: a mirrored map has its pixels in the same places
    pair = torch.cat([batch["image"], batch["image"].flip(3)])
    plain, mirrored = net.segment(pair, batch["size"].repeat(2, 1), batch["mask_size"].repeat(2, 1))
    assert (plain == mirrored.flip(1)).float().mean() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_scores_predicts_and_survives_a_reload(tmp_path, kind):
    batches = data(segmentation_batch(2))
    net = module(kind, ema_decay=0.9, optim=OptimConfig(lr=1e-3, schedule="constant"))
    fit = trainer(tmp_path)
    fit.fit(net, datamodule=batches)
    assert {"val/miou", "val/pixel_accuracy", "val/mean_accuracy"} <= fit.callback_metrics.keys()
    assert net.scores.confusion.sum() == 2 * 64 * 96
    fit.save_checkpoint(tmp_path / "last.ckpt")
    other = module(kind, ema_decay=0.9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    (found,) = trainer(tmp_path).predict(other, datamodule=batches, ckpt_path=tmp_path / "last.ckpt")
    assert other.class_names == list(NAMES)
    batch = batches.batches[0]
    wanted = net.segment(batch["image"], batch["size"], batch["mask_size"])
    assert all(torch.equal(a, b) for a, b in zip(found["predictions"], wanted, strict=True))


def test_mode_and_frozen_stages_hold_through_validations(tmp_path):
    net = module(frozen_stages=1, optim=OptimConfig(lr=1e-2, schedule="constant"))
    before = {name: value.clone() for name, value in net.backbone.body.state_dict().items()}
    trainer(tmp_path, max_epochs=2).fit(net, datamodule=data(segmentation_batch(2)))
    for name, value in net.backbone.body.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("stem.", "stages.0")), name


def test_checkpoint_of_another_head_is_refused():
    with pytest.raises(ValueError, match=r"the checkpoint's head is .*'upernet'.* --model.head"):
        module().on_load_checkpoint({"mirrorla": module("upernet").card.to_dict()})


def test_class_count_of_other_data_is_refused(tmp_path):
    message = "model.num_classes 9 differs from the data's 4 classes; use --model.num_classes 4 or other data"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path).fit(module(num_classes=9), datamodule=data(segmentation_batch(2)))


@pytest.mark.parametrize("window", [(-1, 0), (32, 33)], ids=str)
def test_windows_that_leave_gaps_are_refused(window):
    message = f"window.stride {window[1]} must lie in 0 … window.size {window[0]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        WindowConfig(*window)


def test_description_says_what_is_trained():
    assert re.fullmatch(r"mirrorla_pico upernet, \d\.\d\d M parameters, 4 classes, .*", module("upernet").describe())
