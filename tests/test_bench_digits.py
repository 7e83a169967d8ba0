"""The digits benchmark reads what runs logged, and forgets no earlier result."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from benchmarks import digits


def test_scores_are_those_of_the_last_validation(tmp_path):
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, value in ((10, 0.5), (20, 0.25)):
            writer.add_scalar("val/miou", value, step)
    found = digits.scores(tmp_path)
    assert found["miou"] == 0.25
    assert all(math.isnan(value) for name, value in found.items() if name != "miou")


def test_the_picture_is_the_second_scene_after_the_last_validation(tmp_path):
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, tone in ((10, 50), (20, 90)):
            for place, number in enumerate((0, 25, 50)):
                shown = np.full((8, 9, 3), tone + place, np.uint8)
                writer.add_image(f"figures/predictions/{number:06d}", shown, step, dataformats="HWC")
    with Image.open(io.BytesIO(digits.picture(tmp_path))) as shown:
        assert shown.getpixel((3, 3)) == (91, 91, 91)


def test_a_new_row_replaces_only_its_own():
    def row(config, seed, miou):
        return {"config": config, "seed": seed, "miou": miou}

    old = [row("detection", "0", "1"), row("segmentation", "10", "2"), row("segmentation", "2", "3")]
    rows = digits.merged(old, [row("segmentation", "2", "4"), row("classification", "0", "5")])
    assert [tuple(one.values()) for one in rows] == [
        ("classification", "0", "5"),
        ("segmentation", "2", "4"),
        ("segmentation", "10", "2"),
        ("detection", "0", "1"),
    ]


def test_an_unknown_configuration_is_refused_before_anything_is_trained(capsys):
    with pytest.raises(SystemExit) as ended:
        digits.main(["segmentatoin"])
    assert ended.value.code == 2
    assert "no configuration digits/segmentatoin; choose from classification, segmentation" in capsys.readouterr().err
