"""Checkpoint directories: proved by their manifest, read as plain values only, kept by rank and age."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_modules.callbacks.checkpointing import CheckpointConfig, Moment, between_steps
from lightning_modules.checkpoint import (
    Score,
    list_checkpoints,
    load_plain,
    rank_scores,
    read_scores,
    step_of,
    step_path,
    verify,
    write_scores,
)
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.manifest import MANIFEST, FileRecord, Manifest, parse, render
from lightning_modules.plain import Snapshots, snapshot
from lightning_modules.retention import prune, surplus, tidy
from tests.checkpoint_files import reseal, save, state


def test_save_and_load_is_exact(tmp_path):
    path = save(tmp_path / "checkpoints")
    loaded = CommittedCheckpointIO().load_checkpoint(path, weights_only=False)
    expected = state()
    assert torch.equal(loaded.pop("state_dict")["w"], expected.pop("state_dict")["w"])
    assert loaded == expected
    assert {p.name for p in path.parent.iterdir()} == {"step_00000007", "LATEST"}
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "state.pt", MANIFEST}


def test_manifest_says_what_is_inside(tmp_path):
    path = save(tmp_path, **{"config.yaml": "a: 1\n"})
    manifest = verify(path)
    assert (manifest.step, manifest.epoch, manifest.world_size, manifest.strategy, manifest.token) == (
        7,
        1,
        1,
        "plain",
        5,
    )
    assert manifest.order == {"committed": 7, "guard": {"seed": 0}}
    assert set(manifest.files) == {"model.safetensors", "state.pt", "config.yaml"}
    assert manifest.bytes == sum(p.stat().st_size for p in path.iterdir() if p.name != MANIFEST)
    assert json.loads((path / MANIFEST).read_text())["step"] == 7


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "b": torch.ones(4)[::2]},
        {
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 2),
            "half": torch.ones(2).bfloat16(),
            "flag": torch.tensor(True),
        },
    ],
    ids=["strides", "shapes"],
)
def test_every_kind_of_tensor_survives(tmp_path, tensors):
    shared = torch.arange(6.0)
    weights = {**tensors, "tied": shared, "tied_too": shared, "part": shared[2:4]}
    checkpoint = {**state(), "state_dict": weights, "optimizer_states": [weights]}
    CommittedCheckpointIO().save_checkpoint(checkpoint, step_path(tmp_path, 7))
    loaded = load_plain(step_path(tmp_path, 7))
    for found in (loaded["state_dict"], loaded["optimizer_states"][0]):
        assert found.keys() == weights.keys()
        assert all(
            torch.equal(found[name], weights[name]) and found[name].dtype == weights[name].dtype for name in weights
        )


def test_snapshot_shares_nothing_with_what_it_copies():
    live = {"w": torch.zeros(3), "nested": [torch.zeros(2), ({"x": torch.zeros(1)},)]}
    copy = snapshot(live)
    for tensor in (live["w"], live["nested"][0], live["nested"][1][0]["x"]):
        tensor += 1
    assert copy == {"w": copy["w"], "nested": [copy["nested"][0], ({"x": copy["nested"][1][0]["x"]},)]}
    assert not any(t.any() for t in (copy["w"], copy["nested"][0], copy["nested"][1][0]["x"]))


def test_the_next_snapshot_takes_the_same_memory_and_follows_what_changed():
    snapshots, live = Snapshots(), {"w": torch.zeros(3), "nested": [torch.zeros(2, 2).t(), (torch.tensor(1),)]}
    before = snapshots.take(live)
    places = [before["w"].data_ptr(), before["nested"][0].data_ptr()]
    live = {"w": torch.ones(3), "nested": [torch.ones(2, 2), (torch.tensor([4.0]),)], "new": torch.ones(1)}
    after = snapshots.take(live)
    assert [after["w"].data_ptr(), after["nested"][0].data_ptr()] == places
    assert all(after["w"] == 1) and bool((after["nested"][0] == 1).all())
    assert after["nested"][1][0].tolist() == [4.0] and after["new"].tolist() == [1.0]  # another shape and type
    live["w"] += 1
    assert all(after["w"] == 1)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_manifest_or_a_value_error(content):
    with pytest.raises(ValueError):
        parse(content.decode())


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}(/[a-z.]{1,4}[a-z])?", fullmatch=True), st.integers(0), max_size=4),
    st.integers(0, 10**9),
)
def test_manifest_reads_back_as_written(sizes, step):
    files = {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}
    manifest = Manifest(step, 0, 2, "plain", {"committed": 1, "guard": {"seed": 3}}, "d", "c", None, 1, 9, files)
    assert parse(render(manifest)) == manifest


def test_other_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*none does not exist"):
        load_plain(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"file is no directory"):
        load_plain(tmp_path / "file")
    path = save(tmp_path)
    torch.save({"w": torch.zeros(1)}, path / "state.pt")
    save_file({"w": torch.zeros(1)}, path / "model.safetensors")
    reseal(path)
    with pytest.raises(ValueError, match=r"is no training checkpoint; for plain weights use --model\.backbone"):
        load_plain(path)


def test_listing_is_by_step_and_without_temporaries(tmp_path):
    names = ["step_00000010", "step_00000009-2", "step_00000009", "step_123456789", "step_00000011.tmp-ab"]
    for name in [*names, "step_00000012.superseded", "step_1", "x"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000013").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[2], names[1], names[0], names[3]]
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [9, 9, 10, 123456789]
    assert list_checkpoints(tmp_path / "none") == []


def test_step_of_a_renamed_directory_comes_from_its_manifest(tmp_path):
    save(tmp_path).rename(tmp_path / "mine")
    assert step_of(tmp_path / "mine") == 7
    assert load_plain(tmp_path / "mine")["global_step"] == 7


def test_newest_and_ranked_stay_and_damaged_ones_do_not_count(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (step_path(tmp_path, 5) / "state.pt").unlink()
    assert [step_of(path) for path in surplus(tmp_path, {1}, keep_last=2)] == [2]
    shutil.copytree(step_path(tmp_path, 4), tmp_path / "step_00000004-2")
    assert [path.name for path in surplus(tmp_path, {1}, keep_last=2)] == ["step_00000002", "step_00000004"]
    prune(tmp_path, [Score(1, 0.5)], CheckpointConfig())
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1, 3, 4, 5]
    assert read_scores(tmp_path) == [Score(1, 0.5)]


def test_tidying_sets_later_ones_aside_and_sweeps(tmp_path):
    for _ in range(2):
        for step in (1, 2, 3):
            if not step_path(tmp_path, step).exists():
                save(tmp_path, step)
        (tmp_path / "step_00000004.tmp-0").mkdir()
        (tmp_path / "step_00000004.tmp-0" / "state.pt").touch()
        assert tidy(tmp_path, 1) == {1}
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"LATEST", "step_00000001", "step_00000002.superseded", "step_00000003.superseded"}
        assert (tmp_path / "LATEST").read_text() == "step_00000001\n"


def test_scores_survive_the_disk(tmp_path):
    assert read_scores(tmp_path) == []
    scores = [Score(20, 0.9), Score(10, 0.8)]
    write_scores(tmp_path, "val/top1", scores)
    assert read_scores(tmp_path) == scores


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=20),
    st.integers(1, 5),
    st.booleans(),
)
def test_ranking_keeps_the_best(rows, keep, maximise):
    ranking, latest = [], {}
    for step, value in rows:
        latest[step] = value
        ranking = rank_scores(ranking, Score(step, value), keep=keep, maximise=maximise)
        assert len(ranking) <= keep
    assert ranking == sorted(ranking, key=lambda s: (-s.value if maximise else s.value, s.step))
    if len(latest) == len(rows) and rows:
        best = (max if maximise else min)(latest.values())
        assert ranking[0].value == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 1}, "checkpoint.keep_last 1 must be 2 or above"),
        ({"max_failures": 0}, "checkpoint.max_failures 0 must be 1 or above"),
        ({"every_n_steps": -1}, "checkpoint.every_n_steps -1 must be 0 or above; 0 turns it off"),
    ],
    ids=["keep_last", "max_failures", "every_n_steps"],
)
def test_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**options)


def test_counters_are_corrected_in_a_copy():
    def progress(ready):
        return {"ready": ready, "started": 3, "processed": 3, "completed": 3}

    loops = {
        "fit_loop": {
            "epoch_loop.batch_progress": {"total": progress(4), "current": progress(4), "is_last_batch": True},
            "epoch_loop.val_loop.batch_progress": {"total": progress(3), "current": progress(3)},
        }
    }
    fetched = between_steps(loops, Moment.NEXT_BATCH_READY)["fit_loop"]["epoch_loop.batch_progress"]
    assert fetched == {"total": progress(3), "current": progress(3), "is_last_batch": False}
    begun = between_steps(loops, Moment.INSIDE_VALIDATION)["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    assert begun == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert between_steps(loops, Moment.AS_COUNTED) == loops
