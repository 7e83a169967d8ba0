"""`mirrorla ablate`: what it refuses, what it runs, how it goes on, and that its statistics are scipy's."""

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import ablate_grid as grid
from lightning_modules import ablate_results as results
from lightning_modules import ablate_runs, cli
from lightning_modules.ablate_grid import Cell, Factor
from lightning_modules.paired import paired_difference, summary
from tests.verbs import Verbs

SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]
SCORES = st.floats(0, 1, width=32)


@given(st.lists(SCORES, min_size=2, max_size=8))
def test_summary_is_numpys(scores):
    found = summary(scores)
    assert found.count == len(scores)
    assert found.mean == pytest.approx(np.mean(scores), abs=1e-12)
    assert found.std == pytest.approx(np.std(scores, ddof=1), abs=1e-12)


@given(
    st.dictionaries(st.integers(0, 9), st.tuples(SCORES, SCORES), min_size=2),
    st.dictionaries(st.integers(10, 19), SCORES, max_size=3),
    st.sampled_from([0.9, 0.95, 0.99]),
)
def test_paired_difference_is_scipys_paired_t_test(pairs, unpaired, confidence):
    first = {seed: pair[0] for seed, pair in pairs.items()} | unpaired  # a seed that only one has counts for nothing
    other = {seed: pair[1] for seed, pair in reversed(pairs.items())}
    found = paired_difference(first, other, confidence)
    differences = np.array([b - a for a, b in pairs.values()])
    assert found.count == len(pairs)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    if np.ptp(differences) > 1e-6:  # scipy warns of lost precision where they are all but equal
        interval = stats.ttest_1samp(differences, 0).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
        p = stats.ttest_1samp(differences, 0).pvalue
        if abs(p - (1 - confidence)) > 1e-6:
            assert found.is_significant == (p < 1 - confidence)


def test_without_two_pairs_nothing_is_significant():
    for first, other in (({}, {}), ({0: 0.1}, {0: 0.9}), ({0: 0.1, 1: 0.2}, {2: 0.9, 1: 0.9})):
        found = paired_difference(first, other)
        assert math.isnan(found.low) and math.isnan(found.high) and not found.is_significant
    same = paired_difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert (same.low, same.high, same.is_significant) == (0, 0, False)
    assert math.isnan(summary([]).mean) and math.isnan(summary([1.0]).std)


@given(st.lists(st.text(st.sampled_from("ab[]{},. /~%é\"'"), min_size=1), min_size=2, max_size=2, unique=True))
def test_different_settings_have_different_folders_that_slurm_takes(values):
    factors = [Factor("attention", tuple(values))]
    names = [grid.folder_name(factors, (value,)) for value in values]
    assert names[0] != names[1]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEF0123456789._-+,:=@~ ") for name in names)


def test_the_grid_has_every_combination_once_seed_by_seed():
    factors = [grid.read_factor("attention=mirror,[mirror,softmax]"), grid.read_factor("model.optim.lr = 1e-3")]
    cells = grid.expand(factors, grid.read_seeds("4,0"))
    lists = "[mirror,softmax]"
    assert cells == [Cell((kind, "1e-3"), seed) for seed in (4, 0) for kind in ("mirror", lists)]
    words = [f"--model.backbone.attention={lists}", "--model.optim.lr=1e-3", "--seed_everything=4", "--data.seed=4"]
    assert grid.options(factors, cells[1]) == words


def test_a_training_gets_its_share_of_cores_and_a_gpu_of_its_own():
    share = ablate_runs.environments
    assert share(2, 8, [], {}) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert share(3, 2, [], {"OMP_NUM_THREADS": "7"}) == [{}] * 3
    assert [one["CUDA_VISIBLE_DEVICES"] for one in share(3, 8, ["4", "6"], {})] == ["4", "6", "4"]
    assert share(1, 8, ["0", "1"], {}) == [{"OMP_NUM_THREADS": "8"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which configuration? mirrorla ablate CONFIG --over KEY=V1,V2; see mirrorla ablate --help"),
        (["digits/clasification", "--over", "attention=mirror"], "did you mean digits/classification?"),
        (["digits/classification"], "nothing to compare; give --over KEY=V1,V2, such as --over attention=mirror,so"),
        (["digits/classification", "--over", "attention"], "--over 'attention' is not understood; write KEY=V1,V2,…"),
        (["digits/classification", "--over", "attention=mirror,"], "is not understood; write KEY=V1,V2,…"),
        (["digits/classification", "--over", "attention=relu,relu"], "--over attention has 'relu' twice; give every"),
        (["digits/classification", "--over", "data.seed=0,1"], "--over data.seed: seeds are given with --seeds 0,1"),
        (["digits/classification", "--over", "run_dir=a,b"], "--over run_dir: that is set for every run; choose a key"),
        (
            ["digits/classification", "--over", "attention=mirror", "--over", "model.backbone.attention=softmax"],
            "--over attention is given twice; put all its values into one, by commas",
        ),
        (["digits/classification", "--over", f"run={'a' * 250}"], "name of 254 letters is too long; at most 200"),
        (["digits/classification", "--over", "attention=mirror", "--seeds", "0,-1"], "--seeds '0,-1' must be whole nu"),
        (["digits/classification", "--over", "attention=mirror", "--seeds", "1,1"], "--seeds '1,1' has a seed twice"),
        (["digits/classification", "--over", "attention=mirror", "--jobs", "0"], "--jobs 0 must be 1 or above"),
        (["digits/classification", "--over", "attention=mirror", "--data.seed", "3"], "--data.seed is set for every r"),
        (["digits/classification", "--over", "attention=mirror", "--collect"], "holds no ablation to collect; leave -"),
        (
            ["digits/classification", "--over", "model.backbone.atention=mirror"],
            "unknown key model.backbone.atention (command line); nearest: model.backbone.attention",
        ),
        (["digits/classification", "--over", "attention=mirror,mirrr"], "mirrr"),
        (["digits/classification", "--over", "model.optim.lr=1e-3,fast"], "model.optim.lr: expected float, got 'fast'"),
        (["digits/classification", "--over", "attention=mirror", "--trainer.max_epoch", "2"], "trainer.max_epochs"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_runs(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("mirrorla ablate: error: ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["ablate", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "mirrorla ablate digits/recall --over attention=mirror,relu,softmax --seeds 0,1,2 --jobs 2" in told


class ForkedFit:
    """What `subprocess.Popen` gives, with the training forked from a process that has imported everything."""

    verbs: Verbs
    started: list[str]
    fault: dict[str, str]

    def __init__(self, words, stdout, **unused):
        assert words[:3] == [sys.executable, "-m", "lightning_modules.cli"]
        run = Path(words[words.index("--run_dir") + 1])
        self.started.append(f"{run.parent.name}/{run.name}")
        ended = self.verbs(*words[3:], MIRRORLA_FAULT=self.fault.get(self.started[-1], ""))
        stdout.write(ended.told.encode())
        self.returncode = ended.code

    def poll(self):
        return self.returncode


@pytest.fixture(scope="module")
def verbs(tmp_path_factory):
    with Verbs(tmp_path_factory.mktemp("verbs")) as started:
        yield started


def rows_of(root):
    with (root / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_place(rows):
    return [{name: value for name, value in row.items() if name not in ("run", "commit")} for row in rows]


def test_a_killed_run_is_named_the_others_go_on_and_the_same_command_completes_it(
    verbs, digits, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "ablation"
    command = ["ablate", "digits/classification", "--over", "attention=mirror,softmax", "--seeds", "0,1"]
    shared = [f"--data.path={digits}", *SHORT]
    command += ["--jobs", "1", "--run_dir", str(root), *shared]
    monkeypatch.setattr(ablate_runs.subprocess, "Popen", ForkedFit)
    monkeypatch.setattr(ForkedFit, "verbs", verbs, raising=False)
    monkeypatch.setattr(ForkedFit, "started", [], raising=False)
    kill = {"attention=softmax/seed_0": "checkpoint.after_files:kill:2"}
    monkeypatch.setattr(ForkedFit, "fault", kill, raising=False)
    assert cli.main(command) == 1
    told = capsys.readouterr()
    assert "2/4  attention=softmax seed 0  failed: killed by signal 9" in told.err
    assert "4/4  attention=softmax seed 1  val top-1" in told.err
    assert "In no mean: attention=softmax seed 0 (lost)." in told.out
    assert [row["state"] for row in rows_of(root)] == ["finished", "lost", "finished", "finished"]
    assert len(ForkedFit.started) == 4

    monkeypatch.setattr(ForkedFit, "fault", {})
    assert cli.main(command) == 0
    assert ForkedFit.started[4:] == ["attention=softmax/seed_0"]
    assert "attempt 2" in (root / "attention=softmax" / "seed_0" / "fit.log").read_text()
    table = capsys.readouterr().out

    # the oracle: that training once more, started by hand and never interrupted, beside the others as they are
    by_hand = tmp_path / "by_hand"
    shutil.copytree(root, by_hand)
    run = by_hand / "attention=softmax" / "seed_0"
    shutil.rmtree(run)
    words = ["--model.backbone.attention=softmax", "--seed_everything=0", "--data.seed=0", *shared]
    assert verbs("fit", "--config", "digits/classification", *words, "--run_dir", run).code == 0
    assert len(list((run / "checkpoints").glob("step_*"))) == 2
    command[command.index(str(root))] = str(by_hand)
    assert cli.main([*command, "--collect"]) == 0
    assert len(ForkedFit.started) == 5
    assert capsys.readouterr().out == table.replace(str(root), str(by_hand))
    assert without_place(rows_of(root)) == without_place(rows_of(by_hand))
    check_results(root, rows_of(root))
    check_that_it_grows(command, by_hand, capsys)


def check_results(root, rows):
    """Table, TensorBoard and figure say what the rows say."""
    assert [(row["attention"], row["seed"]) for row in rows] == [
        ("mirror", "0"), ("softmax", "0"), ("mirror", "1"), ("softmax", "1")
    ]  # fmt: skip
    scores = {(row["attention"], int(row["seed"])): 100 * float(row["top1"]) for row in rows}
    differences = [scores["softmax", seed] - scores["mirror", seed] for seed in (0, 1)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    wanted = f"{np.mean(differences):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    line = next(line for line in (root / "results.md").read_text().splitlines() if line.startswith("| softmax |"))
    verdict = "not significant" if interval.low <= 0 <= interval.high else ("higher", "lower")[interval.high < 0]
    assert wanted in line and line.endswith(f"| {verdict} |")
    assert (root / "results.png").read_bytes().startswith(b"\x89PNG")
    for (kind, seed), score in scores.items():
        events = EventAccumulator(str(root / "tensorboard" / f"attention={kind}" / f"seed_{seed}"))
        events.Reload()
        assert 100 * events.Scalars("val/top1")[-1].value == pytest.approx(score, abs=1e-3)
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert kind.encode() in content and b"seed" in content


def check_that_it_grows(command, root, capsys):
    """Other options are another ablation; earlier runs stay in the results of a smaller command."""
    assert cli.main([*command, "--collect", "--trainer.max_steps=1"]) == 2
    assert "holds an ablation with other options; give another --run_dir" in capsys.readouterr().err
    instead = {"attention=mirror,softmax": "attention=softmax,mirror", "0,1": "1"}
    smaller = [instead.get(word, word) for word in command]
    assert cli.main([*smaller, "--collect"]) == 0
    assert "difference to attention=softmax" in capsys.readouterr().out
    assert len(rows_of(root)) == 4
    record = json.loads((root / "ablation.json").read_text())
    assert record["cells"][0] == [["softmax"], 1] and len(record["cells"]) == 4


def test_a_setting_with_one_seed_has_a_difference_without_interval():
    factors = [Factor("attention", ("mirror", "relu", "elu"))]
    rows = [
        results.Row(Cell(("mirror",), 0), "finished", {"top1": 0.5, "loss": 1.0}),
        results.Row(Cell(("relu",), 0), "finished", {"top1": 0.75, "loss": math.nan}),
        results.Row(Cell(("elu",), 0), "finished", {"top1": math.nan}),
    ]
    assert results.headline(rows) == "top1"
    told = results.markdown("maps", factors, rows, "top1")
    assert "| mirror | 1 | 50.00 | – |  |" in told
    assert "| relu | 1 | 75.00 | +25.00 | one pair: no interval |" in told
    assert "| elu | 0 | – | – |  |" in told
    assert "In no mean: attention=elu seed 0 (its score is not finite)." in told


def test_on_slurm_each_setting_is_an_array_whose_numbers_are_the_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["ablate", "digits/classification", "--over", "attention=mirror,softmax", "--seeds", "2,5"]
    words += ["--slurm", "slurm/debug", "--slurm.gpus_per_node", "0", "--dry-run", "--trainer.max_epochs=1"]
    assert cli.main(words) == 0, capsys.readouterr().err
    for kind in ("mirror", "softmax"):
        folder = tmp_path / "runs" / "ablate-digits-classification-attention" / f"attention={kind}"
        script = (folder / "job" / "job.sh").read_text()
        assert "#SBATCH --array=2,5\n" in script
        assert f"run={folder}\n" in script and "run=$run/seed_$SLURM_ARRAY_TASK_ID\n" in script
        assert f"--model.backbone.attention={kind}" in script and "--trainer.max_epochs=1" in script
        assert '--seed_everything "$SLURM_ARRAY_TASK_ID" --data.seed "$SLURM_ARRAY_TASK_ID"' in script


@pytest.mark.slow
def test_a_stopped_ablation_stops_its_trainings_and_goes_on_with_the_same_command(digits, tmp_path):
    root = tmp_path / "ablation"
    command = [sys.executable, "-m", "lightning_modules.cli", "ablate", "digits/classification"]
    command += ["--over", "attention=mirror,softmax", "--seeds", "0,1", "--jobs", "2", "--run_dir", str(root)]
    command += [f"--data.path={digits}", "--trainer.max_epochs=3", "--checkpoint.every_n_steps=1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 250
    while len(list(root.glob("*/seed_0/checkpoints/step_*"))) < 2 and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.05)
    first.terminate()
    told = first.communicate(timeout=120)[1]
    assert first.returncode == 143 and "give the same command again to go on" in told
    assert [ablate_runs.condition(run) for run in sorted(root.glob("*/seed_0"))] == ["stopped", "stopped"]
    assert not list(root.glob("*/seed_1"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in rows_of(root)] == ["finished"] * 4
    assert all("attempt 2" in (run / "fit.log").read_text() for run in root.glob("*/seed_0"))
