"""torchvision's detectors over our backbones: anchors, parity with torchvision's own, merged detections."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from mirrorla.heads.detection import DetectorConfig
from mirrorla.heads.detections import flipped, in_original_pixels, merged
from mirrorla.heads.detector_parts import AsGiven, PyramidAnchors
from tests.dense_batches import detection_batch, detector

KINDS = ("retinanet", "mask_rcnn")
PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}


def objects_of(batch, has_masks=True):
    names = ("boxes", "labels", "masks") if has_masks else ("boxes", "labels")
    return [{name: target[name] for name in names} for target in batch["target"]]


class TestAnchors:
    def test_equal_torchvisions_where_sizes_divide(self):
        from torchvision.models.detection.image_list import ImageList
        from torchvision.models.detection.retinanet import _default_anchorgen

        ours, theirs = PyramidAnchors((8, 16, 32, 64, 128), 4.0, 3), _default_anchorgen()
        images = ImageList(torch.zeros(2, 3, 128, 256), [(128, 256)] * 2)
        maps = [torch.zeros(2, 1, 128 // s, 256 // s) for s in (8, 16, 32, 64, 128)]
        assert all(torch.equal(a, b) for a, b in zip(ours(images, maps), theirs(images, maps), strict=True))

    def test_stay_in_place_for_odd_sizes_and_half_precision(self):
        from torchvision.models.detection.image_list import ImageList

        anchors = PyramidAnchors((4,), 8.0, 1)
        images = ImageList(torch.zeros(1, 3, 97, 97), [(97, 97)])
        centres = anchors(images, [torch.zeros(1, 1, 25, 25, dtype=torch.bfloat16)])[0]
        assert centres.dtype == torch.float32
        assert ((centres[:, 0] + centres[:, 2]) / 2).unique().tolist() == [4.0 * i for i in range(25)]


def torchvisions(kind, ours, num_classes=3):
    """torchvision's own model over the same pyramid, with our weights."""
    features = copy.deepcopy(ours.backbone)
    if kind == "retinanet":
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        theirs = RetinaNet(features, num_classes, anchor_generator=anchors, detections_per_img=100, **PLAIN)
    else:
        anchors = AnchorGenerator(tuple((x,) for x in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        options = {"rpn_pre_nms_top_n_train": 64, "rpn_post_nms_top_n_train": 32, "rpn_batch_size_per_image": 32}
        theirs = MaskRCNN(
            features,
            rpn_anchor_generator=anchors,
            box_batch_size_per_image=16,
            box_head=TwoMLPHead(16 * 49, 32),
            box_predictor=FastRCNNPredictor(32, num_classes + 1),
            mask_head=MaskRCNNHeads(16, [16], 1),
            mask_predictor=MaskRCNNPredictor(16, 16, num_classes + 1),
            rpn_pre_nms_top_n_test=64,
            rpn_post_nms_top_n_test=32,
            **options,
            **PLAIN,
        )
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize("kind", KINDS)
class TestTorchvisionParity:
    # 128 divides all strides: torchvision's guesses of strides and scales are right, and nothing is padded
    SIZES = ((128, 128),)

    def test_losses_and_gradients_are_torchvisions(self, kind):
        ours = detector(kind).train()
        theirs = torchvisions(kind, ours).train()
        batch = detection_batch(2, self.SIZES)
        targets = objects_of(batch, kind == "mask_rcnn")
        shifted = targets if kind == "mask_rcnn" else [{**t, "labels": t["labels"] - 1} for t in targets]
        results = []
        for network, given_targets in ((ours, targets), (theirs, shifted)):
            torch.manual_seed(1)  # both sample anchors and regions
            losses = network(batch["image"], given_targets)
            sum(losses.values()).backward()
            results.append((losses, {n: p.grad for n, p in network.named_parameters()}))
        assert results[0][0].keys() == results[1][0].keys()
        torch.testing.assert_close(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1])

    def test_detections_are_torchvisions(self, kind):
        ours = detector(kind, score_threshold=0.0 if kind == "retinanet" else 0.05).eval()
        theirs = torchvisions(kind, ours).eval()
        theirs.transform, theirs.score_thresh = AsGiven(), ours.score_thresh if kind == "retinanet" else 0.05
        image = detection_batch(1, self.SIZES)["image"]
        with torch.no_grad():
            found, wanted = ours(image)[0], theirs(image)[0]
        assert len(found["labels"]) > 5 and found.keys() == wanted.keys()
        assert torch.equal(found["labels"], wanted["labels"] + (kind == "retinanet"))
        for name in set(found) - {"labels"}:
            torch.testing.assert_close(found[name], wanted[name])


def test_normalised_towers_are_torchvisions_with_a_norm():
    from torchvision.models.detection.retinanet import RetinaNetHead

    ours = detector("retinanet", norm=True).head
    theirs = RetinaNetHead(16, 9, 3, norm_layer=partial(nn.GroupNorm, 1))
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    torch.testing.assert_close(ours(maps), theirs(maps))


@pytest.mark.parametrize("kind", KINDS)
class TestDetectors:
    @pytest.mark.parametrize("name", ["resnet18", "pvt_v2_b0"])
    def test_any_hierarchical_timm_backbone_trains(self, kind, name):
        network = detector(kind, name).train()
        batch = detection_batch(2)
        losses = network(batch["image"], objects_of(batch, kind == "mask_rcnn"))
        sum(losses.values()).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []

    def test_statistics_say_how_anchors_and_objects_met(self, kind):
        network, batch = detector(kind).train(), detection_batch(2)
        network(batch["image"], objects_of(batch))
        found = {name: float(value) for name, value in network.statistics.items()}
        assert set(found) == {"positives_per_image", "foreground_accuracy", "false_negatives"}
        assert found["positives_per_image"] >= 2  # every object has its best anchor, and itself as a region
        assert 0 <= found["foreground_accuracy"] <= 1 and 0 <= found["false_negatives"] <= 1

    def test_images_without_objects_train(self, kind):
        network, batch = detector(kind).train(), detection_batch(2, num_objects=0)
        losses = network(batch["image"], objects_of(batch))
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert [name for name, p in network.named_parameters() if p.grad is None] == []
        assert float(network.statistics["positives_per_image"]) == 0

    def test_coordinates_keep_full_precision_under_autocast(self, kind):
        network, image = detector(kind, score_threshold=0.0).eval(), detection_batch(1, ((64, 640),))["image"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            boxes = network(image)[0]["boxes"]
        assert boxes.dtype == torch.float32
        far = boxes[boxes > 256]
        assert len(far) and not torch.equal(far, far.bfloat16().float())


class TestDetections:
    def found(self):
        return {
            "boxes": torch.tensor([[10.0, 5.0, 30.0, 25.0], [50.0, 5.0, 60.0, 15.0]]),
            "labels": torch.tensor([1, 2]),
            "scores": torch.tensor([0.9, 0.8]),
            "masks": torch.ones(2, 1, 28, 28),
        }

    def test_go_back_to_original_pixels(self):
        mapped = in_original_pixels(self.found(), (40, 80), (80, 240))
        assert mapped["boxes"].tolist() == [[30.0, 10.0, 90.0, 50.0], [150.0, 10.0, 180.0, 30.0]]
        assert mapped["masks"].shape == (2, 80, 240) and mapped["masks"].dtype == torch.bool
        rows, columns = torch.where(mapped["masks"][0])
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        # half a pixel of the seen image, which is one row and 1.5 columns here, and the whole pixels of the result
        assert ((edges - mapped["boxes"][0]).abs() <= torch.tensor([2.5, 2.0, 2.5, 2.0])).all()

    @pytest.mark.parametrize("centre", [(24.3, 30.8), (31.9, 41.2), (28.0, 33.5)], ids=str)
    def test_masks_come_back_from_the_targets_that_detectors_learn(self, centre):
        """torchvision's own target of a disc, pasted, is the disc again; its own pasting is further off."""
        rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 17.3**2
        box = torch.tensor([[centre[1] - 18.6, centre[0] - 17.9, centre[1] + 17.4, centre[0] + 18.8]])
        raw = project_masks_on_boxes(disc[None], box, torch.tensor([0]), 28)[None]
        found = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([1.0]), "masks": raw}
        same = in_original_pixels(found, (64, 96), (64, 96))["masks"][0]
        theirs = paste_masks_in_image(raw, box, (64, 96))[0, 0] >= 0.5
        wrong, wrong_theirs = (int((pasted != disc).sum()) for pasted in (same, theirs))
        assert wrong <= 0.02 * disc.sum() and wrong < 0.5 * wrong_theirs
        halved = in_original_pixels(found, (64, 96), (128, 192))["masks"][0].reshape(64, 2, 96, 2).float().mean((1, 3))
        assert ((halved >= 0.5) != disc).sum() <= 0.04 * disc.sum()

    def test_without_objects_have_masks_of_the_images_size(self):
        empty = {name: value[:0] for name, value in self.found().items()}
        assert in_original_pixels(empty, (40, 80), (20, 40))["masks"].shape == (0, 20, 40)

    def test_flipping_twice_changes_nothing(self):
        found = in_original_pixels(self.found(), (40, 80), (40, 80))
        for name, value in flipped(flipped(found, 80), 80).items():
            assert torch.equal(value, found[name])

    def test_merging_keeps_the_better_of_two_that_overlap(self):
        one = in_original_pixels(self.found(), (40, 80), (40, 80))
        other = {**one, "boxes": one["boxes"] + 1, "scores": one["scores"] + 0.05}
        both = merged([one, other], 0.5, 10)
        assert torch.equal(both["boxes"], other["boxes"]) and len(both["masks"]) == 2
        assert merged([one], 0.5, 1) is one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "detector.channels 0 must be 1 or above"),
        ({"mask_convs": 0}, "detector.mask_convs 0 and max_detections 100 must be 1 or above"),
        ({"anchor_scale": 0.0}, "detector.anchor_scale 0.0 must be above 0"),
        ({"nms_threshold": 1.5}, "detector.nms_threshold 1.5 must lie in [0, 1]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_detector_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectorConfig(**options)
