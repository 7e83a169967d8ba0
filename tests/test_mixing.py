"""Mixup, cutmix and soft targets."""

import numpy as np
import pytest
import torch

from lightning_modules.mixing import MixConfig, Mixer, smooth_targets


def test_smooth_targets_are_torchs_label_smoothing():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    ours = torch.nn.functional.cross_entropy(logits, smooth_targets(labels, 5, 0.1))
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))


def test_without_mixing_images_stay_the_same_object():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    mixed, targets = Mixer(MixConfig(), 2, 0.0)(images, labels, torch.ones(3))
    assert mixed is images
    assert targets.tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("size", [1, 2, 5, 8], ids="B{}".format)
@pytest.mark.parametrize("config", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(mixup=0.8, cutmix=1.0)])
def test_any_batch_size_mixes_into_distributions(size, config):
    np.random.seed(0)  # noqa: NPY002
    images, labels = torch.randn(size, 3, 8, 8), torch.arange(size) % 4
    before = images.clone()
    mixed, targets = Mixer(config, 4, 0.1)(images, labels, torch.ones(size))
    assert torch.equal(images, before)
    assert mixed.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(size))
    if size % 2:  # the odd last sample is left alone
        assert torch.equal(mixed[-1], images[-1])
        assert torch.equal(targets[-1], smooth_targets(labels[-1:], 4, 0.1)[0])
    if size > 1:
        assert not torch.equal(mixed[:-1], images[:-1])


def test_mixing_repeats_under_the_same_numpy_seed():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixer = Mixer(MixConfig(mixup=0.8, cutmix=1.0), 4, 0.0)
    results = []
    for _ in range(2):
        np.random.seed(3)  # noqa: NPY002
        results.append(mixer(images, labels, torch.ones(4))[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("config", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_a_sample_is_not_mixed_with_a_skipped_one(config):
    np.random.seed(0)  # noqa: NPY002
    images, labels, weights = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 0, 3]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    images[2] = 0.0  # what a skipped sample looks like
    mixed, targets = Mixer(config, 4, 0.1)(images, labels, weights)
    torch.testing.assert_close(mixed[1], images[1])  # timm's partner of sample 1 is sample 2
    torch.testing.assert_close(targets[1], smooth_targets(labels[1:2], 4, 0.1)[0])
    assert not torch.equal(mixed[0], images[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1.0}, "mix.mixup -1.0 must be 0 or above"),
        ({"cutmix": -0.1}, "mix.cutmix -0.1 must be 0 or above"),
        ({"switch_prob": 1.5}, r"mix.switch_prob 1.5 must lie in \[0, 1\]"),
        ({"prob": -0.5}, r"mix.prob -0.5 must lie in \[0, 1\]"),
    ],
    ids=["mixup", "cutmix", "switch_prob", "prob"],
)
def test_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        MixConfig(**options)
