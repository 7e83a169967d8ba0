"""The detection module: weights of samples, recipe options, exact evaluation, checkpoints of other models."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_modules.backbone import BackboneConfig
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.detection import DetectionModule, share_of
from lightning_modules.optim import OptimConfig
from lightning_modules.views import ViewConfig
from mirrorla.heads.detection import DetectorConfig
from tests.dense_batches import SMALL, Batches, blank, detection_batch, trainer

# The averaged copy and frozen stages stay in evaluation mode on purpose; these loaders need no workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
KINDS = ("retinanet", "mask_rcnn")
STILL = OptimConfig(lr=1e-30, schedule="constant", weight_decay=0.0)


def module(kind="retinanet", name="mirrorla_pico", num_classes=3, **options):
    torch.manual_seed(0)
    sizes = {**SMALL, **options.pop("sizes", {})}
    return DetectionModule(
        num_classes, BackboneConfig(name), DetectorConfig(kind, **sizes), **{"optim": STILL, **options}
    )


class Gradients(Callback):
    """Keeps the gradients of the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.of = {name: p.grad.clone() for name, p in pl_module.network.named_parameters() if p.grad is not None}


def close(found, wanted):
    """Equal up to the rounding of sums over the pixels of a few images: some hundred units in the last place."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()) + 1e-12)


def gradients(tmp_path, batch, kind):
    trainer(tmp_path, kept := Gradients(), StepSeed(0), max_steps=1, limit_val_batches=0).fit(
        module(kind), datamodule=Batches([batch])
    )
    return kept.of


class TestShare:
    def test_weight_is_the_ranks_share_of_the_good_samples(self):
        batch = detection_batch(4)
        batch["weight"] = torch.tensor([1.5, 0.0, 1.5, 1.5])  # 3 of 4 good on the bigger of two ranks
        share = share_of(batch, has_masks=False)
        assert len(share.images) == 3 and share.weight == pytest.approx(1.5 * 3 / 4)
        assert torch.equal(share.images[1], batch["image"][2])
        assert share.targets[0].keys() == {"boxes", "labels"}

    def test_one_sample_of_weight_zero_stays_when_all_were_skipped(self):
        batch = detection_batch(2)
        batch["weight"] = torch.zeros(2)
        share = share_of(batch, has_masks=True)
        assert len(share.images) == 1 and share.weight == 0
        assert share.targets[0].keys() == {"boxes", "labels", "masks"}

    def test_masks_that_the_data_lacks_are_named(self):
        message = "model.detector.kind 'mask_rcnn' learns masks and the data has none; use --model.detector.kind retin"
        with pytest.raises(ValueError, match=re.escape(message)):
            share_of(detection_batch(with_masks=False), has_masks=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_sample_changes_no_gradient_but_its_share(tmp_path, kind):
    batch = detection_batch(3)
    without = {key: value[:2] for key, value in batch.items()}
    found, wanted = gradients(tmp_path, blank(batch, 2), kind), gradients(tmp_path, without, kind)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        close(gradient, wanted[name] * 2 / 3)


def test_uneven_shares_add_up_to_the_gradient_of_the_global_batch(tmp_path):
    """RetinaNet's loss is a mean over images. No BatchNorm, one size: statistics and padding differ between shares."""
    batch = detection_batch(3, sizes=((64, 96),))
    parts = [{key: value[chosen] for key, value in batch.items()} for chosen in (slice(0, 2), slice(2, 3))]
    for part in parts:  # N b / B
        part["weight"] = torch.full_like(part["weight"], 2 * len(part["id"]) / 3)

    def of(some):
        net = module("retinanet", "test_convnext")
        share = share_of(some, has_masks=False)
        loss = share.weight * sum(net.network(share.images, share.targets).values())
        loss.backward()
        return {name: p.grad for name, p in net.network.named_parameters()}

    whole, ranks = of(batch), [of(part) for part in parts]
    for name, gradient in whole.items():
        close((ranks[0][name] + ranks[1][name]) / 2, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_every_term_and_the_matching_are_logged(tmp_path, kind):
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(module(kind), datamodule=Batches([detection_batch(2)]))
    metrics = fit.callback_metrics
    terms = {
        "retinanet": {"classification", "bbox_regression"},
        "mask_rcnn": {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"},
    }[kind]
    assert {name for name in metrics if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
    torch.testing.assert_close(sum(metrics[f"loss/{term}"] for term in terms), metrics["train/loss"])
    assert {"matcher/positives_per_image", "matcher/foreground_accuracy", "matcher/false_negatives"} <= metrics.keys()
    assert {"lr/backbone_no_decay", "lr/head_no_decay", "train/grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_found_objects_do_not_depend_on_the_batch(kind):
    net = module(kind, sizes={"score_threshold": 0.0})
    batch = detection_batch(3, sizes=((64, 96), (97, 50), (33, 130)))
    sizes = [(128, 200), (97, 50), (66, 260)]
    together = net.detect(batch["image"], sizes)
    assert net.network.training  # the mode came back
    for place, (image, size) in enumerate(zip(batch["image"], sizes, strict=True)):
        (alone,) = net.detect([image], [size])
        assert alone.keys() == together[place].keys()
        assert len(alone["scores"]) and all(torch.equal(alone[name], together[place][name]) for name in alone)
        assert alone["boxes"][:, 2].max() <= size[1] and alone["boxes"][:, 3].max() <= size[0]
        assert set(alone["labels"].tolist()) <= {1, 2, 3}
        assert torch.equal(alone["scores"], alone["scores"].sort(descending=True).values)
        if kind == "mask_rcnn":
            assert alone["masks"].shape[1:] == size and alone["masks"].dtype == torch.bool


class BrightBox(nn.Module):
    """Finds the bright pixels; its mask is the left half of their box, the right one in a mirrored image."""

    def forward(self, images):
        rows, columns = torch.where(images[0][0] > 1)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        mask = torch.zeros(1, 1, 28, 28)
        mask[..., :14] = 1
        if images[0][2, 0, 0] > 1:  # the mark in the right corner came to the left
            mask = mask.flip(3)
        scores = torch.tensor([0.9])
        return [{"boxes": torch.tensor([box]).float(), "labels": torch.tensor([2]), "scores": scores, "masks": mask}]


def test_flipped_and_scaled_views_find_the_same_place():
    image = torch.zeros(3, 64, 96)
    image[0, 10:30, 20:60] = 2
    image[2, :4, -4:] = 2
    net = module(views=ViewConfig(flip=True, scales=(1.0, 2.0)))
    net.network = BrightBox()
    seen = list(net.views.of(64, 96))
    assert seen == [(64, 96, False), (64, 96, True), (128, 192, False), (128, 192, True)]
    (found,) = net.detect([image], [(32, 48)])  # four looks, one object, in pixels of an original of half the size
    assert found["boxes"].shape == (1, 4) and found["labels"].tolist() == [2]
    torch.testing.assert_close(found["boxes"][0], torch.tensor([10.0, 5.0, 30.0, 15.0]), atol=1, rtol=0)
    columns = torch.where(found["masks"][0])[1]
    assert columns.min() <= 11 and 18 <= columns.max() <= 21


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_scores_predicts_and_survives_a_reload(tmp_path, kind):
    data = Batches([detection_batch(2)])
    net = module(kind, ema_decay=0.9, sizes={"score_threshold": 0.0}, optim=OptimConfig(lr=1e-3, schedule="constant"))
    fit = trainer(tmp_path)
    fit.fit(net, datamodule=data)
    assert {"val/box_ap", "val/box_ap50"} <= fit.callback_metrics.keys()
    assert ("val/mask_ap" in fit.callback_metrics) == (kind == "mask_rcnn")
    assert net.scores.box.class_ap.shape == (3,)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    other = module(kind, ema_decay=0.9, sizes={"score_threshold": 0.0})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    (batches,) = [trainer(tmp_path).predict(other, datamodule=data, ckpt_path=tmp_path / "last.ckpt")]
    assert other.class_names == ["red", "green", "blue"]
    batch = data.batches[0]
    wanted = net.detect(batch["image"], [tuple(t["size"].tolist()) for t in batch["target"]])
    assert batches[0]["id"].tolist() == [0, 1] and batches[0]["weight"].tolist() == [1, 1]
    for found, expected in zip(batches[0]["predictions"], wanted, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_average_is_what_is_evaluated(tmp_path):
    net = module(ema_decay=0.99, optim=OptimConfig(lr=1e-2, schedule="constant"))
    trainer(tmp_path, limit_val_batches=0, max_epochs=3).fit(net, datamodule=Batches([detection_batch(2)]))
    assert net.evaluated is net.ema.module
    weight, average = net.network.head.classification_head.cls_logits.weight, net.ema.module.head
    assert not torch.equal(weight, average.classification_head.cls_logits.weight)


def test_backbone_has_a_learning_rate_of_its_own_and_mirrors_do_not_decay():
    net = module("mask_rcnn", optim=OptimConfig(lr=1e-3, backbone_scale=0.1, weight_decay=0.05))
    from lightning_modules.optim import parameter_groups

    groups = {g["name"]: g for g in parameter_groups(net.network, net.optim_config, net.backbone.body)}
    assert groups.keys() == {"backbone_decay", "backbone_no_decay", "head_decay", "head_no_decay"}
    assert groups["backbone_decay"]["lr"] == pytest.approx(1e-4) and groups["head_decay"]["lr"] == 1e-3
    names = {id(p): name for name, p in net.network.named_parameters()}
    members = {group: {names[id(p)] for p in found["params"]} for group, found in groups.items()}
    assert set().union(*members.values()) == set(names.values())
    assert sum(map(len, members.values())) == len(names)
    assert any(".mirrors." in name for name in members["backbone_no_decay"])
    assert not any(".mirrors." in name for name in members["backbone_decay"])
    assert all("trunk" in name for name in members["backbone_decay"] | members["backbone_no_decay"])


def test_frozen_stages_stay_as_they_start(tmp_path):
    net = module(frozen_stages=2, optim=OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.05))
    before = {name: value.clone() for name, value in net.backbone.body.state_dict().items()}
    trainer(tmp_path, max_epochs=2).fit(net, datamodule=Batches([detection_batch(2)]))  # with validations in between
    frozen = ("stem.", "stages.0", "stages.1", "merges.0")
    for name, value in net.backbone.body.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_a_classifiers_checkpoint_starts_the_backbone(tmp_path):
    from lightning_modules.classification import ClassificationModule

    classifier = ClassificationModule(10, BackboneConfig("mirrorla_pico"), ema_decay=0.9)
    with torch.no_grad():
        for parameter in classifier.ema.module.parameters():
            parameter.add_(0.5)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pt")
    net = DetectionModule(
        3, BackboneConfig("mirrorla_pico", pretrained=str(tmp_path / "classifier.pt")), DetectorConfig("retinanet")
    )
    taken = net.backbone.body.state_dict()
    for name, value in classifier.ema.module.state_dict().items():
        assert name.startswith("head.") or torch.equal(taken[name], value)
    torch.save({"state_dict": module("mask_rcnn").state_dict()}, tmp_path / "detector.pt")
    again = DetectionModule(3, BackboneConfig("mirrorla_pico", pretrained=str(tmp_path / "detector.pt")))
    stem = module("mask_rcnn").backbone.body.stem[0][0].weight
    assert torch.equal(again.backbone.body.stem[0][0].weight, stem)


def test_class_count_of_other_data_is_refused(tmp_path):
    message = "model.num_classes 5 differs from the data's 3 classes; use --model.num_classes 3 or other data"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path).fit(module(num_classes=5), datamodule=Batches([detection_batch(2)]))


def test_data_without_names_leaves_those_of_the_checkpoint(tmp_path):
    net = module()
    net.on_load_checkpoint({"mirrorla": {**net.card.to_dict(), "class_names": ["a", "b", "c"]}})
    trainer(tmp_path).predict(net, datamodule=Batches([detection_batch(2)], class_names=()))
    assert net.class_names == ["a", "b", "c"]


def test_checkpoint_of_another_detector_is_refused():
    card = module("mask_rcnn").card.to_dict()
    with pytest.raises(ValueError, match=r"the checkpoint's head is .*'mask_rcnn'.* change --model.detector"):
        module("retinanet").on_load_checkpoint({"mirrorla": card})


def test_sizes_that_only_matter_at_run_time_do_not_refuse_a_checkpoint():
    card = module(sizes={"proposals": 7, "score_threshold": 0.3}).card.to_dict()
    module().on_load_checkpoint({"mirrorla": card})


def test_description_says_what_is_trained():
    layout = "attention mirror mirror mirror mirror"
    pattern = rf"mirrorla_pico retinanet, 0\.\d\d M parameters, 3 classes, {layout}, EMA 0.9"
    assert re.fullmatch(pattern, module(ema_decay=0.9).describe())


def test_compiled_backbone_keeps_its_parameter_names(tmp_path):
    plain, compiled = module(ema_decay=0.9), module(ema_decay=0.9, compile=True)
    compiled.trainer = trainer(tmp_path)
    compiled.setup("fit")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for network in (compiled.network, compiled.ema.module):
        assert network.backbone.trunk._compiled_call_impl is not None


@pytest.mark.parametrize("scales", [(), (0.0, 1.0)], ids=str)
def test_views_are_refused_with_their_scales(scales):
    with pytest.raises(ValueError, match=re.escape(f"views.scales {list(scales)} must hold numbers above 0")):
        ViewConfig(scales=scales)
