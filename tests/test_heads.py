"""The heads: shapes for any size, and the same numbers as torchvision's own models with the same weights."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from mirrorla.dense import DenseBackbone, create_dense_backbone
from mirrorla.heads.fpn import FPN
from mirrorla.heads.segmentation import Segmenter, SegmenterConfig, class_map, pixel_loss, sliding_logits, windows

STRIDES = (4, 8, 16, 32)


def maps_of(size, channels=(8, 12, 16, 20)):
    return [
        torch.randn(2, c, *(-(-side // stride) for side in size)) for c, stride in zip(channels, STRIDES, strict=True)
    ]


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
