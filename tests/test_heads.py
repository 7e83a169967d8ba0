"""The heads: shapes for any size, and the same numbers as torchvision's own models with the same weights."""

import copy
import re
from collections import OrderedDict
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import FeaturePyramidNetwork

from mirrorla.dense import DenseBackbone, create_dense_backbone
from mirrorla.heads.detection import DetectorConfig
from mirrorla.heads.detections import flipped, in_original_pixels, merged
from mirrorla.heads.detector_parts import AsGiven, PyramidAnchors
from mirrorla.heads.fpn import FPN
from mirrorla.heads.segmentation import Segmenter, SegmenterConfig, class_map, pixel_loss, sliding_logits, windows
from tests.dense_batches import detection_batch, detector

KINDS = ("retinanet", "mask_rcnn")
STRIDES = (4, 8, 16, 32)
PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}


def maps_of(size, channels=(8, 12, 16, 20)):
    return [
        torch.randn(2, c, *(-(-side // stride) for side in size)) for c, stride in zip(channels, STRIDES, strict=True)
    ]


def objects_of(batch, has_masks=True):
    names = ("boxes", "labels", "masks") if has_masks else ("boxes", "labels")
    return [{name: target[name] for name in names} for target in batch["target"]]


class TestFPN:
    def test_equals_torchvision(self):
        torch.manual_seed(0)
        maps = maps_of((97, 65))
        ours, theirs = FPN([8, 12, 16, 20], 16), FeaturePyramidNetwork([8, 12, 16, 20], 16)
        for mine, other in ((ours.laterals, theirs.inner_blocks), (ours.outputs, theirs.layer_blocks)):
            for a, b in zip(mine, other, strict=True):
                a.load_state_dict(b[0].state_dict())
        expected = theirs(OrderedDict(enumerate(maps))).values()
        for got, wanted in zip(ours(maps), expected, strict=True):
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize(("extra", "sides"), [("none", []), ("pool", [2]), ("conv", [2, 1])])
    def test_coarser_levels_halve(self, extra, sides):
        out = FPN([8, 12, 16, 20], 16, extra)(maps_of((97, 97)))
        assert [x.shape[2] for x in out] == [25, 13, 7, 4, *sides]


class TestSegmenters:
    @pytest.mark.parametrize("kind", ["semantic_fpn", "upernet"])
    @pytest.mark.parametrize("size", [(64, 64), (33, 61), (97, 130)], ids=str)
    def test_logits_have_stride_four_for_any_size(self, kind, size):
        network = Segmenter(create_dense_backbone("mirrorla_pico"), 5, SegmenterConfig(kind, channels=16)).eval()
        with torch.no_grad():
            logits = network.all_logits(torch.randn(2, 3, *size))
        assert logits["head"].shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
        assert set(logits) == ({"head"} if kind == "semantic_fpn" else {"head", "auxiliary"})

    @pytest.mark.parametrize("kind", ["semantic_fpn", "upernet"])
    def test_a_single_image_trains_every_parameter(self, kind):
        network = Segmenter(create_dense_backbone("mirrorla_pico"), 5, SegmenterConfig(kind, 32)).train()
        logits = network.all_logits(torch.randn(1, 3, 64, 64))
        sum(value.square().mean() for value in logits.values()).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []

    def test_the_head_looks_at_one_image_only(self):
        torch.manual_seed(0)
        head = Segmenter(create_dense_backbone("mirrorla_pico"), 5, SegmenterConfig("upernet", 32, dropout=0.0)).head
        maps = maps_of((64, 64), (32, 48, 96, 128))
        torch.testing.assert_close(head.train()(maps)[:1], head([x[:1] for x in maps]), rtol=1e-4, atol=1e-5)

    def test_defaults_are_the_published_ones(self):
        fpn, upernet = SegmenterConfig("semantic_fpn"), SegmenterConfig("upernet")
        assert (fpn.width, fpn.auxiliary, upernet.width, upernet.auxiliary) == (256, 0.0, 512, 0.4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": 1}, "head.channels 1 must be 2 or above"),
            ({"dropout": 1.0}, "head.dropout 1.0 must lie in [0, 1)"),
            ({"auxiliary_weight": -1.0}, "head.auxiliary_weight -1.0 must be 0 or above"),
        ],
        ids=["channels", "dropout", "auxiliary"],
    )
    def test_options_are_refused_with_their_value(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            SegmenterConfig(**options)


class TestPixels:
    def test_every_labelled_pixel_weighs_the_same(self):
        torch.manual_seed(0)
        logits, mask = torch.randn(3, 4, 10, 12), torch.randint(0, 4, (3, 10, 12))
        mask[0, :5] = 255
        mask[2] = 255
        loss = pixel_loss(logits, mask)
        whole = nn.functional.cross_entropy(logits, mask, ignore_index=255, reduction="sum")
        torch.testing.assert_close(loss.sum() * 120, whole)
        assert loss[2] == 0

    @given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.data())
    def test_windows_cover_everything_and_stay_inside(self, height, width, window, data):
        stride = data.draw(st.integers(1, window))
        seen = torch.zeros(height, width)
        for top, left in windows((height, width), window, stride):
            assert 0 <= top <= max(0, height - window) and 0 <= left <= max(0, width - window)
            seen[top : top + window, left : left + window] += 1
        assert seen.min() >= 1

    def test_windows_of_a_pixelwise_network_change_nothing(self):
        torch.manual_seed(0)
        network, image = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 50, 70)
        torch.testing.assert_close(sliding_logits(network, image, 32, 20), network(image))

    @given(st.integers(1, 40), st.sampled_from([(7, 9), (3, 5)]))
    def test_class_map_is_the_resized_argmax(self, num_classes, size):
        torch.manual_seed(num_classes)
        logits = torch.randn(1, num_classes, 5, 6)
        wanted = nn.functional.interpolate(logits, size=size, mode="bilinear").argmax(1)[0]
        assert torch.equal(class_map([logits], size), wanted)

    def test_probabilities_of_several_views_are_averaged(self):
        sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 0.5])
        views = [v.reshape(1, 2, 1, 1) for v in (unsure, unsure, sure)]
        assert class_map(views[:2], (2, 2)).unique().tolist() == [1]
        assert class_map(views, (2, 2)).unique().tolist() == [0]


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


class TestDenseBackbone:
    def test_gives_the_wanted_strides(self):
        backbone = create_dense_backbone("mirrorla_pico", strides=(8, 16, 32))
        assert backbone.channels == (48, 96, 128) and backbone.strides == (8, 16, 32)
        maps = backbone.forward_features(torch.randn(1, 3, 64, 96))
        assert [tuple(x.shape[1:]) for x in maps] == [(48, 8, 12), (96, 4, 6), (128, 2, 3)]
        sum(x.square().mean() for x in maps).backward()
        assert [n for n, p in backbone.named_parameters() if p.grad is None] == []  # no norm that nobody reads

    @pytest.mark.parametrize("name", ["mirrorla_pico", "resnet18", "test_convnext"])
    @pytest.mark.parametrize("stages", [1, 2])
    def test_frozen_stages_keep_weights_and_statistics(self, name, stages):
        torch.manual_seed(0)
        backbone = create_dense_backbone(name)
        backbone.freeze(stages)
        backbone.train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        images = torch.randn(2, 3, 64, 64)
        sum(x.square().mean() for x in backbone(images)).backward()
        frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
        learning = {n for n, p in backbone.named_parameters() if p.grad is not None}
        assert frozen and learning and not frozen & learning
        assert frozen | learning == dict(backbone.named_parameters()).keys()
        for part in backbone._frozen:
            assert not any(module.training for module in part.modules())
        mine = {id(b) for part in backbone._frozen for b in part.buffers()}
        for key, buffer in backbone.named_buffers():
            assert id(buffer) not in mine or torch.equal(buffer, before[key]), key
        if name == "mirrorla_pico":
            assert any("stages.1" in n for n in frozen) == (stages == 2)
            assert not any("stages.2" in n or "norms" in n for n in frozen)
            moved = [k for k, b in backbone.named_buffers() if "running_mean" in k and not torch.equal(b, before[k])]
            assert moved

    def test_frozen_parts_survive_a_copy(self):
        backbone = create_dense_backbone("mirrorla_pico")
        backbone.freeze(1)
        twin = copy.deepcopy(backbone).train()
        assert not twin.body.stem.training and twin.body.stages[1].training and backbone.body.stem is not twin.body.stem

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: create_dense_backbone("mirrorla_tinny"), "backbone 'mirrorla_tinny' is unknown: did you mean"),
            (
                lambda: create_dense_backbone("vit_tiny_patch16_224"),
                "backbone 'vit_tiny_patch16_224' gives maps at",
            ),
            (lambda: create_dense_backbone("resnet18", attention=("softmax",) * 4), "'resnet18' has no mirrors"),
            (lambda: create_dense_backbone("mirrorla_pico").freeze(5), "model.frozen_stages 5 must lie in 0 … 4"),
        ],
        ids=["unknown", "flat", "mirrors", "stages"],
    )
    def test_mistakes_are_named_in_one_line(self, build, message):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            build()
        assert "\n" not in str(caught.value)

    def test_maps_in_channels_last_order_are_turned(self):
        class Swin(nn.Module):
            class feature_info:  # noqa: N801
                channels, reduction = staticmethod(lambda: [4, 6]), staticmethod(lambda: [4, 8])

            output_fmt = "NHWC"

            def forward(self, x):
                return [torch.zeros(1, x.shape[2] // s, x.shape[3] // s, c) for c, s in ((4, 4), (6, 8))]

        maps = DenseBackbone(Swin(), (4, 8))(torch.zeros(1, 3, 32, 64))
        assert [tuple(x.shape) for x in maps] == [(1, 4, 8, 16), (1, 6, 4, 8)]


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
