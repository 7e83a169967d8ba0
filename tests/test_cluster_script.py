"""The batch script: whatever is written into a field is refused or arrives as it was, and nothing else is run."""

import os
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser as torchs_parser

from cluster.config import SlurmConfig
from cluster.sbatch import Job, default_name, render

CODES = (75, 76, 80, 137, 138, 143)
EVIL = [
    "$(touch canary)",
    "`touch canary`",
    "'; touch canary; '",
    '"; touch canary; "',
    "a\ntouch canary",
    "&touch canary&",
]
EVIL += ["--wrap=touch canary", "\\", "'", '"', "a b", "ü", "%j", "#", "$HOME", "*", "~", "!x", "a\u2028b", "\ud800"]
PLAIN = {"job_name": "x", "modules": ("cuda/13.0",), "source": ("/venv/activate",), "environment": {"A": "b"}}
TEXT_FIELDS = [field.name for field in fields(SlurmConfig) if "str" in str(field.type) and field.name != "environment"]

# Every command that the script may run, as a function that writes its words down.
STUBS = """
note() { { printf '%s\\0' "$@"; printf '\\1'; } >> "$CALLS"; }
srun() { note srun "$@"; [ -z "${FIRST:-}" ] || printf '%s\\n' "$FIRST" > "$job/first_failure"; return "${CODE:-0}"; }
sbatch() { note sbatch "$@"; }
env() { note env "$@"; return "${ENV_CODE:-0}"; }
module() { note module "$@"; }
source() { note source "$@"; }
scontrol() { if [ "$1" = requeue ]; then note "$@"; return "${REQUEUE:-0}"; else echo localhost; fi; }
"""


def job(folder, *words, run="run"):
    return Job(tuple(words), folder / run, folder, "/usr/bin/python3", CODES, 77)


def play(script, folder, **variables):
    """Run a script with stubs; gives its exit code, what it said, and every command with its words."""
    calls = folder / "calls"
    calls.write_bytes(b"")
    (folder / "script.sh").write_text(script)
    environment = {"PATH": os.environ["PATH"], "CALLS": str(calls), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_TASK_ID": "3", **variables}
    text = STUBS + "set -- \n" + script
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    found = [call.decode().split("\0")[:-1] for call in calls.read_bytes().split(b"\1") if call]
    return done.returncode, done.stdout + done.stderr, found


def trained(calls):
    """The words of the training in the one srun call."""
    (call,) = [words for words in calls if words[0] == "srun"]
    return call[call.index("--") + 1 :]


def evil_or_plain():
    return st.one_of(st.sampled_from(EVIL), st.text(max_size=20))


@settings(max_examples=100)
@given(field=st.sampled_from(TEXT_FIELDS), text=evil_or_plain())
@example(field="array", text="0-4\ntouch canary")
@example(field="container", text="image$(touch canary)")
@example(field="time", text="1")
def test_any_text_in_any_field_is_refused_or_gives_a_script_that_runs_only_the_training(field, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    value = (text,) if isinstance(getattr(SlurmConfig(), field), tuple) else text
    more = {"container": "image"} if field == "container_mounts" else {}
    try:
        script = render(SlurmConfig(**{field: value, **more}), job(folder, "-m", "x"))
    except ValueError as error:
        assert f"slurm.{field}" in str(error) and "\n" not in str(error)
        return
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    code, said, calls = play(script, folder)
    assert code == 0, said
    assert {words[0] for words in calls} <= {"srun", "module", "source"}
    assert not (folder / "canary").exists()
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len({line.partition("=")[0] for line in directives}) == len(directives)


@settings(max_examples=100)
@given(words=st.lists(evil_or_plain(), max_size=4), value=evil_or_plain(), path=evil_or_plain())
def test_words_variables_and_paths_arrive_exactly(words, value, path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    try:
        config = SlurmConfig(environment={"VALUE": value}, source=(path,))
        script = render(config, job(folder, "-m", "x", *words))
    except ValueError as error:
        assert "\n" not in str(error)
        assert any(ord(c) < 32 or not c.isprintable() for text in (*words, value, path) for c in text) or path == ""
        return
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    code, said, calls = play(script + '\nprintf "" ', folder)
    assert code == 0, said
    assert trained(calls)[: 3 + len(words)] == ["/usr/bin/python3", "-m", "x", *words]
    assert ["source", path] in calls
    assert not (folder / "canary").exists()
    line = next(line for line in script.splitlines() if line.startswith("export VALUE="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$VALUE"'], capture_output=True, check=True)
    assert shown.stdout.decode() == value


@settings(max_examples=60)
@given(name=evil_or_plain())
def test_any_run_directory_is_refused_or_used_as_it_is(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    try:
        script = render(SlurmConfig(), job(folder, "-m", "x", run=f"r{name}".replace("/", "-")))
    except ValueError as error:
        assert "run_dir" in str(error)
        return
    code, said, calls = play(script, folder)
    assert code == 0, said
    words = trained(calls)
    assert words[words.index("--run_dir") + 1] == str(folder / f"r{name}".replace("/", "-"))
    assert not (folder / "canary").exists()


def test_the_script_reads_as_documented(tmp_path):
    config = SlurmConfig(partition="gpu", nodes=4, gpus_per_node=8, gpu_type="h100", cpus_per_task=12)
    script = render(config, job(tmp_path, "-m", "x", run="my run"))
    head = script[: script.index("\n\n")].splitlines()
    assert head == [
        "#!/bin/bash",
        "#SBATCH --job-name=my-run",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --gpus-per-node=h100:8",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --open-mode=append",
        f'#SBATCH --output="{tmp_path}/my run/logs/slurm_%j.out"',
        "#SBATCH --requeue",
    ]
    assert max(map(len, script.splitlines())) < 250
    (call,) = play(script, tmp_path)[2]
    assert call[:5] == ["srun", "--kill-on-bad-exit=1", "--wait=60", "--ntasks-per-node=8", "--cpus-per-task=12"]
    tail = ["--ckpt_path", "last", "--trainer.num_nodes", "2", "--trainer.devices", "8"]
    assert trained([call])[-len(tail) :] == tail


@pytest.mark.parametrize(("launcher", "step"), [("srun", (8, 12)), ("torchrun", (1, 96))])
def test_a_range_of_nodes_is_asked_for_without_a_number_of_tasks(launcher, step, tmp_path):
    config = SlurmConfig(nodes=4, min_nodes=3, gpus_per_node=8, cpus_per_task=12, launcher=launcher)
    script = render(config, job(tmp_path, "-m", "x"))
    assert "#SBATCH --nodes=3-4\n#SBATCH --mincpus=96\n#SBATCH --gpus-per-node=8\n" in script
    (call,) = play(script, tmp_path)[2]
    assert call[3:5] == [f"--ntasks-per-node={step[0]}", f"--cpus-per-task={step[1]}"]


@pytest.mark.parametrize("code", [1, 2, 73, 77, 130])
def test_the_exit_code_of_the_training_is_the_jobs(code, tmp_path):
    script = render(SlurmConfig(), job(tmp_path, "-m", "x"))
    found, said, calls = play(script, tmp_path, CODE=str(code))
    assert found == code and "not one to go on after" in said
    assert [words[0] for words in calls] == ["srun"]


@pytest.mark.parametrize("code", CODES)
def test_a_job_that_can_go_on_is_queued_again_once(code, tmp_path):
    script = render(SlurmConfig(), job(tmp_path, "-m", "x"))
    found, _, calls = play(script, tmp_path, CODE=str(code))
    assert found == code
    assert [words for words in calls if words[0] != "srun"] == [["requeue", "7"]]


def test_the_first_failure_decides_and_not_what_killing_the_others_looked_like(tmp_path):
    script = render(SlurmConfig(), job(tmp_path, "-m", "x"))
    found, said, calls = play(script, tmp_path, CODE="143", FIRST="2 5 node2")
    assert found == 2 and "rank 5 on node2 ended first, with code 2" in said
    assert [words[0] for words in calls] == ["srun"]
    assert play(script, tmp_path, CODE="137", FIRST="138 0 node1")[2][-1] == ["requeue", "7"]


def test_a_job_that_may_not_go_on_ends_with_the_trainings_code(tmp_path):
    script = render(SlurmConfig(requeue=False), job(tmp_path, "-m", "x"))
    assert "#SBATCH --no-requeue" in script and "scontrol requeue" not in script
    assert play(script, tmp_path, CODE="138")[0] == 138


def test_a_refused_requeue_is_said_with_the_mend(tmp_path):
    script = render(SlurmConfig(), job(tmp_path, "-m", "x"))
    found, said, _ = play(script, tmp_path, CODE="138", REQUEUE="1")
    assert found == 138 and f"to go on: sbatch {tmp_path}/run/job/job.sh" in said


def test_three_restarts_without_a_new_checkpoint_end_the_job(tmp_path):
    script = render(SlurmConfig(), job(tmp_path, "-m", "x"))
    checkpoints = tmp_path / "run" / "checkpoints"
    codes = [play(script, tmp_path, CODE="138", SLURM_RESTART_COUNT=str(n))[0] for n in range(3)]
    checkpoints.mkdir()
    (checkpoints / "step_00000010").mkdir()
    codes += [play(script, tmp_path, CODE="138", SLURM_RESTART_COUNT=str(n))[0] for n in range(3, 6)]
    (checkpoints / "step_00000020.tmp-x").mkdir()  # not committed: no progress
    found, said, calls = play(script, tmp_path, CODE="138", SLURM_RESTART_COUNT="6")
    assert codes == [138] * 6
    assert found == 77 and "3 restarts got no further than step_00000010" in said
    assert calls == []
    assert play(script, tmp_path, CODE="138")[0] == 138  # submitted anew by a person


def test_a_node_that_failed_twice_is_left_out_by_a_new_job(tmp_path):
    script = render(SlurmConfig(exclude="node9", array="0-4"), job(tmp_path, "-m", "x"))
    notes = tmp_path / "run" / "seed_3" / "job"
    notes.mkdir(parents=True)
    (notes / "strikes").write_text("node2 1 of 8 GPUs answer\nnode1 disk\n")
    assert play(script, tmp_path, CODE="80")[2][-1] == ["requeue", "7"]
    (notes / "strikes").write_text("node2 1 of 8 GPUs answer\nnode1 disk\nnode2 again\n")
    call = play(script, tmp_path, CODE="80", SLURM_RESTART_COUNT="1")[2][-1]
    submit = ["sbatch", "--exclude=node9,node2", "--array=3", f"{tmp_path}/run/job/job.sh"]
    assert call == ["env", "-u", "SLURM_RESTART_COUNT", "MIRRORLA_RESTARTS=2", "MIRRORLA_EXCLUDED=node2,", *submit]
    again = play(script, tmp_path, CODE="80", MIRRORLA_EXCLUDED="node2,")[2][-1]
    assert again == ["requeue", "7"]


def test_every_number_of_an_array_is_a_seed_with_a_run_of_its_own(tmp_path):
    script = render(SlurmConfig(array="0-4%2"), job(tmp_path, "-m", "x"))
    words = trained(play(script, tmp_path)[2])
    assert words[words.index("--run_dir") + 1] == str(tmp_path / "run" / "seed_3")
    assert words[-4:] == ["--seed_everything", "3", "--data.seed", "3"]


def test_a_container_is_wrapped_around_the_training_and_not_around_the_script(tmp_path):
    pyxis = SlurmConfig(container="/images/a.sqsh", container_mounts=("/data:/data:ro",))
    (call,) = play(render(pyxis, job(tmp_path, "-m", "x")), tmp_path)[2]
    run = tmp_path / "run"
    assert call[5:8] == [
        "--container-image=/images/a.sqsh",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={run}:{run},/data:/data:ro",
    ]
    assert trained([call])[0] == "python"
    apptainer = SlurmConfig(container="/images/a.sif", container_runtime="apptainer", container_mounts=("/data:/data",))
    (call,) = play(render(apptainer, job(tmp_path, "-m", "x")), tmp_path)[2]
    words = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", str(run), "--bind", "/data:/data"]
    assert call[5 : 5 + len(words) + 1] == [*words, "/images/a.sif"]


def test_bandwidth_is_measured_first_and_a_failure_keeps_the_training_from_starting(tmp_path):
    script = render(SlurmConfig(min_bandwidth_gb_s=10), job(tmp_path, "-m", "x"))
    first, second = play(script, tmp_path)[2]
    strikes = ["--strikes", f"{tmp_path}/run/job/strikes"]
    assert trained([first])[1:] == ["-m", "lightning_modules.bandwidth", "--at-least", "10", *strikes]
    assert trained([second])[1:3] == ["-m", "x"]
    code, _, calls = play(script, tmp_path, CODE="80")
    assert code == 80 and [words[0] for words in calls] == ["srun", "requeue"]


def test_torchrun_starts_one_agent_per_node(tmp_path):
    config = SlurmConfig(nodes=2, gpus_per_node=4, cpus_per_task=3, launcher="torchrun")
    script = render(config, job(tmp_path, "-m", "x"))
    assert "#SBATCH --ntasks-per-node=1" in script and "#SBATCH --cpus-per-task=12" in script
    (call,) = play(script, tmp_path)[2]
    assert call.count("--") == 3 and "--agent" in call[: call.index("--")]
    agent = call[call.index("--") + 1 :]
    assert agent[1:8] == ["-m", "torch.distributed.run", "--no-python", "--nnodes", "2", "--nproc-per-node", "4"]
    assert torchs_parser().parse_args(agent[3:]).training_script_args[:2] == ["-m", "cluster.launch"]


@pytest.mark.parametrize(
    ("name", "expected"), [("run", "run"), ("a b/c", "c"), ("--", "mirrorla"), ("ü", "mirrorla"), ("a b", "a-b")]
)
def test_a_job_is_named_after_its_run_directory(name, expected):
    assert default_name(Path("/x") / name) == expected
