"""benchmarks.maps: what its table says of given scores, and what the Fashion-MNIST subset keeps."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from benchmarks import diagnostics_tokens, maps
from benchmarks.fashion_mnist import subset
from datamodules.sources_idx import idx
from mirrorla.diagnostics import mirror_metrics


def rows(scores: dict[str, list[float]], task: str = "counting") -> list[dict[str, str]]:
    return [
        {"task": task, "setting": setting, "seed": str(seed), "metric": "top1", "score": f"{score}"}
        for setting, found in scores.items()
        for seed, score in enumerate(found)
    ]


def test_a_task_separates_only_beyond_three_standard_errors():
    apart = rows({"mirror": [0.8, 0.82, 0.81], "relu": [0.6, 0.62, 0.61], "softmax": [0.9, 0.91, 0.93]})
    close = rows({"mirror": [0.8, 0.82, 0.81], "relu": [0.6, 0.9, 0.61], "softmax": [0.62, 0.91, 0.63]}, "recall")
    text = maps.table([*apart, *close])
    assert "* counting separates the maps: softmax - relu = +30.3, standard error 0.88." in text
    assert any(
        line.startswith("* recall does not separate")
        for line in maps.table(rows({"relu": [0.9, 0.5], "softmax": [0.8, 0.8]}, "recall"))
    )
    assert text[0] == "| % | seeds | mirror | mirror x4 | relu | elu | focused | polar | norm_aware | softmax |"
    assert "| counting: top-1 | 3 | 81.0 ± 1.0 | – | 61.0 ± 1.0 * | – | – | – | – | 91.3 ± 1.5 * |" in text
    assert "| recall: top-1 | 3 | 81.0 ± 1.0 | – | 70.3 ± 17.0 | – | – | – | – | 72.0 ± 16.5 |" in text


def test_a_difference_whose_interval_holds_zero_has_no_star():
    without, with_star = (
        maps.table(rows({"mirror": [0.8, 0.9, 0.7], "relu": relu})) for relu in ([0.9, 0.7, 0.82], [0.7, 0.81, 0.6])
    )
    assert "| 80.7 ± 10.1 |" in without[2]
    assert "| 70.3 ± 10.5 * |" in with_star[2]


def test_a_single_seed_has_neither_deviation_nor_star():
    text = maps.table(rows({"mirror": [0.93], "relu": [0.91]}, "fashion"))
    assert text[2].startswith("| fashion: top-1 | 1 | 93.0 | – | 91.0 |")


def test_a_task_over_something_else_than_maps_has_a_table_of_its_own():
    text = maps.table(rows({"off": [0.7, 0.71, 0.72], "power 2": [0.8, 0.81, 0.82]}, "parts of mirror, counting"))
    assert "| parts of mirror, counting | seeds | top-1 % | against the first (95 %) |" in text
    assert "| off | 3 | 71.0 ± 1.0 |  |" in text
    assert "| power 2 | 3 | 81.0 ± 1.0 * | +10.0 (+10.0 … +10.0) |" in text


def test_values_of_mirrors_stand_under_their_labels(tmp_path: Path):
    (tmp_path / "results.csv").write_text(
        "model.backbone.mirror,seed,state,top1,commit,device,torch\n"
        '"{modulation: none, cross_head: false}",0,finished,0.5,c,cpu,2\n'
    )
    (found,) = maps.rows_of("parts of mirror, counting", tmp_path)
    assert found["setting"] == "block only, static"


def test_settings_of_one_table_may_be_trained_by_several_tasks(tmp_path: Path):
    (tmp_path / "results.csv").write_text(
        "model.backbone.mirror,seed,state,top1,commit,device,torch\n"
        '"{power: 2.0, query_mirrors: 4}",0,finished,0.5,c,cpu,2\n'
    )
    (found,) = maps.rows_of("counting, mirror x4", tmp_path)
    assert (found["task"], found["setting"]) == ("counting", "mirror x4")
    old = [*rows({"mirror": [0.7, 0.8], "mirror x4": [0.1, 0.2], "relu": [0.6, 0.7]}), *rows({"relu": [0.5]}, "recall")]
    new = rows({"mirror x4": [0.8, 0.9]})
    assert maps.merged(old, new) == [*old[:2], *new, *old[4:]]
    assert maps.merged(old[:2], new) == [*old[:2], *new]
    assert "| counting: top-1 | 2 | 75.0 ± 7.1 | 85.0 ± 7.1 * |" in maps.table(maps.merged(old, new))[2]


def test_an_unknown_task_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        maps.main(["countings"])
    assert stopped.value.code == 2
    assert "there is no task 'countings'; choose from counting" in capsys.readouterr().err


def test_a_subset_keeps_the_first_training_images_and_the_whole_test_set(tmp_path: Path):
    for split, count in (("train", 12), ("t10k", 5)):
        images = np.zeros((count, 28, 28), np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes()
        )
        labels = bytes(n % 10 for n in range(count))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)
    whole = idx(tmp_path)
    part = subset(whole, 7)
    assert [sample.key for sample in part.splits["train"]] == [sample.key for sample in whole.splits["train"]][:7]
    assert len(part.splits["val"]) == 5


@pytest.fixture(scope="module")
def pico():
    torch.manual_seed(0)
    return timm.create_model("mirrorla_pico", num_classes=10).eval()


def test_diagnostics_see_the_wanted_number_of_tokens(pico):
    seen = []
    hook = pico.stages[0][0].attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    images = torch.rand(2, 3, 32, 32)
    found = {n: diagnostics_tokens.measured(pico, images, n, pico.spec.depths[0]) for n in (64, 196)}
    hook.remove()
    assert seen == [64, 196]
    by_hand = mirror_metrics(pico, images)
    assert float(found[64]["entropy"]) == pytest.approx(by_hand["attn/entropy/layer_0"], rel=1e-4)
    kept = (by_hand["mirror/retained_energy/q/layer_0"] + by_hand["mirror/retained_energy/k/layer_0"]) / 2
    assert float(found[64]["retained_energy"]) == pytest.approx(kept, rel=1e-4)


def test_a_map_without_the_metric_has_a_dash_in_the_table():
    row = {
        "setting": "elu",
        "seed": "0",
        "retained_energy": "",
        "entropy": "0.5",
        "effective_rank": "3",
        "denominator_min": "0.125",
    }
    lines = diagnostics_tokens.table([{**row, "N": "64"}, {**row, "N": "16384", "entropy": "0.75"}])
    assert lines[-1] == "| elu | 1 | – / – | 0.5 / 0.75 | 3 / 3 | 0.125 / 0.125 |"


def test_diagnostics_without_their_runs_say_how_to_make_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        diagnostics_tokens.main(["--runs", str(tmp_path)])
    assert stopped.value.code == 2
    assert "has no results.csv; run first: python -m benchmarks.maps 'digits'" in capsys.readouterr().err
