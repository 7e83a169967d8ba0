"""Augmentation belongs to the sample: it depends on nothing else, and disturbs nothing else."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.transforms import (
    EvalTransform,
    TrainTransform,
    _posterize,
    denormalise,
    eval_pipeline,
    seeded,
    train_pipeline,
)
from datamodules.types import DataError

PLAIN = {"auto_augment": None, "color_jitter": 0.0, "random_erasing": 0.0}
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
DIGITS = TrainTransform(32, crop=False, hflip=0, degrees=10, translate=0.1, zoom=(0.9, 1.1), **PLAIN)


def picture(width=96, height=80):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def draw_all():
    return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002


RECIPES = {
    "imagenet": TrainTransform(64),
    "jitter": TrainTransform(64, auto_augment=None),
    "digits": DIGITS,
    "augmix": TrainTransform(64, auto_augment="augmix-m5-w4-d2"),
    "original": TrainTransform(64, auto_augment="original-mstd0.5"),
    "nearest": TrainTransform(64, interpolation="nearest"),
}


@pytest.mark.parametrize("transform", RECIPES.values(), ids=RECIPES.keys())
def test_a_samples_augmentation_is_a_function_of_its_key(transform):
    def augmented(*key):
        with seeded(*key):
            return train_pipeline(transform)(picture())

    reference = augmented(1, 2, 3, 0)
    seed_all(5)
    assert torch.equal(augmented(1, 2, 3, 0), reference)
    assert reference.shape == (3, transform.image_size, transform.image_size)
    assert reference.dtype == torch.float32
    assert reference.is_contiguous()
    for other in ((0, 2, 3, 0), (1, 0, 3, 0), (1, 2, 0, 0), (1, 2, 3, 1), (2, 1, 3, 0)):
        assert not torch.equal(augmented(*other), reference)


def test_seeding_leaves_no_trace_also_after_an_error():
    seed_all(1)
    expected = draw_all()
    seed_all(1)
    with pytest.raises(KeyError), seeded(0, 0, 0, 0):
        draw_all()
        raise KeyError
    assert draw_all() == expected


def test_without_randomness_the_train_pipeline_is_a_plain_resize():
    still = TrainTransform(32, crop=False, hflip=0, **PLAIN, **UNIT)
    torch.testing.assert_close(
        train_pipeline(still)(picture()), eval_pipeline(EvalTransform(32, None, **UNIT))(picture())
    )


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    """Against Pillow, step by step."""
    image = picture(100, 60)
    resized = image.resize((round(100 * 48 / 60), 48), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((20, 4, 60, 44))).transpose(2, 0, 1) / 255
    actual = eval_pipeline(EvalTransform(40, 48, **UNIT))(image)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


def test_upsampling_eight_pixels_is_bicubic():
    image = picture(8, 8)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    actual = eval_pipeline(EvalTransform(32, None, **UNIT))(image)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


def test_normalisation_is_undone():
    transform = EvalTransform(32, None)
    tensor = eval_pipeline(transform)(picture())
    restored = denormalise(tensor[None], transform.mean, transform.std)
    assert restored.min() >= 0
    assert restored.max() <= 1
    torch.testing.assert_close(restored[0], eval_pipeline(EvalTransform(32, None, **UNIT))(picture()))


def test_a_flip_happens_as_often_as_asked():
    transform = TrainTransform(8, crop=False, hflip=0.3, **PLAIN)
    pipeline, image = train_pipeline(transform), picture(8, 8)
    plain = train_pipeline(TrainTransform(8, crop=False, hflip=0, **PLAIN))(image)
    flipped = 0
    for sample in range(1000):
        with seeded(0, 0, sample, 0):
            flipped += not torch.equal(pipeline(image), plain)
    assert abs(flipped - 300) < 60  # 4 sigma


def test_digits_recipe_stays_close_to_the_digit():
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (3, 1, 5, 7))
    still = train_pipeline(TrainTransform(32, crop=False, hflip=0, **PLAIN))(image)
    for sample in range(20):
        with seeded(0, 0, sample, 0):
            moved = train_pipeline(DIGITS)(image)
        assert torch.corrcoef(torch.stack([moved.flatten(), still.flatten()]))[0, 1] > 0.3


@pytest.mark.parametrize("name", ["rand-m10-n15-inc1", "rand-m0-n15", "augmix-m10-w4-d2", "original", "v0"])
def test_every_operation_of_a_policy_works_at_its_strongest(name):
    pipeline = train_pipeline(TrainTransform(16, auto_augment=name))
    for sample in range(60):
        with seeded(0, 0, sample, 0):
            assert pipeline(picture(20, 20)).isfinite().all()


def test_posterizing_keeps_the_highest_bits():
    image = picture()
    pixels = np.asarray(image).astype(int)
    for bits in range(9):
        kept = np.asarray(_posterize(image, bits, fillcolor=0))
        np.testing.assert_array_equal(kept, pixels // 2 ** (8 - bits) * 2 ** (8 - bits))


def test_erasing_fills_a_part_with_noise():
    erase = TrainTransform(32, crop=False, hflip=0, auto_augment=None, color_jitter=0, random_erasing=1.0)
    still = train_pipeline(TrainTransform(32, crop=False, hflip=0, **PLAIN))(picture())
    with seeded(0, 0, 0, 0):
        share = (train_pipeline(erase)(picture()) != still).float().mean()
    assert 0.01 < share < 0.4


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (TrainTransform(0), "data.train_transform.image_size is 0; it must be at least 1"),
        (TrainTransform(hflip=1.5), "data.train_transform.hflip is 1.5; it must be between 0 and 1"),
        (TrainTransform(random_erasing=-0.1), "random_erasing is -0.1; it must be between 0 and 1"),
        (TrainTransform(degrees=200), "degrees is 200; it must be between 0 and 180"),
        (TrainTransform(scale=(0.5, 0.2)), "train_transform.scale is 0.5 0.2; it must be 0 < min <= max <= 1"),
        (TrainTransform(zoom=(0.0, 1.0)), "zoom is 0.0 1.0; it must be 0 < min <= max"),
        (
            TrainTransform(std=(1.0, 0.0, 1.0)),
            r"std is \(1.0, 0.0, 1.0\); every channel must be above 0",
        ),
        (TrainTransform(auto_augment="rnd-m9"), "auto_augment 'rnd-m9' is no timm policy; an example is rand-m9"),
        (TrainTransform(auto_augment="rand-x3"), "auto_augment 'rand-x3' is no timm policy"),
        (EvalTransform(-1), "data.eval_transform.image_size is -1; it must be at least 1"),
        (EvalTransform(224, 200), "data.eval_transform.resize is 200; it must be at least 224"),
    ],
)
def test_impossible_values_are_refused_by_name(transform, message):
    build = train_pipeline if isinstance(transform, TrainTransform) else eval_pipeline
    with pytest.raises(DataError, match=message):
        build(transform)
