"""Files and directories are committed or absent, never torn, whatever happens while they are written."""

import errno
import resource
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import list_checkpoints, load_plain, newest_valid, next_path, step_path
from lightning_modules.checkpoint_io import CommittedCheckpointIO, describe
from lightning_modules.commit import commit_file, commit_text, discard, publish, sweep, temporary
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.fault_points import VARIABLE, parse_faults, reach
from lightning_modules.persist import Background, Draft, commit_checkpoint
from lightning_modules.plain import WRITE_ERRORS, snapshot, write_plain

ROOT = Path(__file__).parent.parent
POINTS = ("begin", "after_weights", "after_state", "after_files", "after_manifest", "after_rename", "after_latest")


def state(step):
    return {"global_step": step, "epoch": 0, "state_dict": {"w": torch.full((1000,), float(step))}, "rest": [step]}


def save(folder, step):
    CommittedCheckpointIO().save_checkpoint(state(step), step_path(folder, step))


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file"
    commit_text(target, "old")

    def fail_midway(stream):
        stream.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit_file(target, fail_midway)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    outside, target = tmp_path / "outside", tmp_path / "LATEST"
    outside.write_text("precious")
    target.symlink_to(outside)
    commit_text(target, "new")
    assert outside.read_text() == "precious"
    assert not target.is_symlink() and target.read_text() == "new"


def test_kill_while_writing_leaves_whole_files_only(tmp_path):
    program = textwrap.dedent(
        """
        import sys, pathlib
        from lightning_modules.commit import commit_file
        target = pathlib.Path(sys.argv[1])
        def write(stream):
            for _ in range(2000):
                stream.write(mark * 100)
        print("ready", flush=True)
        for number in range(10**6):
            mark = bytes([number % 256])
            commit_file(target, write)
        """
    )
    target = tmp_path / "file"
    for milliseconds in (10, 25, 40, 55, 70):
        process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, cwd=ROOT)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(milliseconds / 1000)
        process.kill()
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_published_folder_never_replaces_another(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    with pytest.raises(FileExistsError, match="a committed checkpoint is never overwritten"):
        publish(second, first)


def test_removal_is_a_rename_first(tmp_path, monkeypatch):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setattr("lightning_modules.commit.remove", lambda path: None)  # killed right after the rename
    discard(folder)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == []
    assert len(sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def killed_writer():
    """A function that saves steps 1 and 2 into a folder, in a process that a fault ends during the second."""
    program = textwrap.dedent(
        """
        import json, os, pathlib, sys
        from tests_commit import save
        for line in sys.stdin:
            folder, fault = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.environ["MIRRORLA_FAULT"] = fault
                for step in (1, 2):
                    save(pathlib.Path(folder), step)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        """
    )
    loader = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('tests_commit', sys.argv[1]);"
        "m = importlib.util.module_from_spec(s); sys.modules['tests_commit'] = m; s.loader.exec_module(m)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", loader + program, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:

        def run(folder, fault):
            server.stdin.write(f'["{folder}", "{fault}"]\n')
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_point_of_a_write_leaves_the_previous_or_the_new_one(tmp_path, killed_writer, point):
    assert killed_writer(tmp_path, f"checkpoint.{point}:kill:2") == -9
    committed = 2 if point in ("after_rename", "after_latest") else 1
    assert newest_valid(tmp_path).name == f"step_0000000{committed}"
    assert load_plain(newest_valid(tmp_path))["rest"] == [committed]
    assert len(sweep(tmp_path)) == 2 - committed
    assert {path.name for path in tmp_path.iterdir()} <= {"LATEST", "step_00000001", "step_00000002"}


@pytest.mark.parametrize("point", POINTS[:-2])
def test_full_disk_at_every_point_leaves_the_previous_one_and_no_leftover(tmp_path, monkeypatch, point):
    save(tmp_path, 1)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setenv(VARIABLE, f"checkpoint.{point}:full")
    monkeypatch.setattr("lightning_modules.fault_points._reached", Counter())
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert newest_valid(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("limit", [100, 5000, 100_000], ids="{}B".format)
def test_file_size_limit_leaves_the_previous_one(tmp_path, limit):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # SIGXFSZ is ignored by Python: writing fails instead
    try:
        for _ in range(3):
            large = {**state(2), "state_dict": {"w": torch.zeros(10**5)}, "optimizer": torch.zeros(10**5)}
            with pytest.raises(WRITE_ERRORS):
                CommittedCheckpointIO().save_checkpoint(large, step_path(tmp_path, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001"]
    assert load_plain(newest_valid(tmp_path))["rest"] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_device_that_is_always_full_leaves_the_previous_one(tmp_path):
    save(tmp_path, 1)

    def write(folder):
        (folder / "model.safetensors").symlink_to("/dev/full")
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(b"x" * 10**6)

    with pytest.raises(OSError) as failed:
        commit_checkpoint(Draft(step_path(tmp_path, 2), describe(2, 0, None)), write)
    assert failed.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001"]


def test_step_written_again_gets_the_next_version_and_replaces_nothing(tmp_path):
    save(tmp_path, 1)
    again = next_path(tmp_path, 1)
    assert again.name == "step_00000001-2"
    CommittedCheckpointIO().save_checkpoint(state(1), again)
    assert newest_valid(tmp_path) == again
    assert next_path(tmp_path, 1).name == "step_00000001-3"
    with pytest.raises(FileExistsError):
        save(tmp_path, 1)


def test_lost_lease_stops_the_rename(tmp_path):
    calls = []

    def token():
        calls.append(1)
        if len(calls) > 1:  # lost between the manifest and the rename
            raise GuardStop("another job has it", ExitCode.LEASE_LOST)
        return 7

    copy = snapshot(state(1))
    with pytest.raises(GuardStop, match="another job has it"):
        commit_checkpoint(
            Draft(tmp_path / "step_00000001", describe(1, 0, None), token), lambda f: write_plain(f, copy)
        )
    assert list(tmp_path.iterdir()) == []


def test_background_job_is_one_at_a_time_and_tells_how_it_went():
    events, background = [], Background()

    def job(name, error=None):
        def run():
            events.append(f"{name} begins")
            if error:
                raise error
            events.append(f"{name} ends")

        return run

    background.start(job("a"))
    background.start(job("b", OSError("full")))
    background.start(job("c"))
    assert background.wait() >= 0
    assert events == ["a begins", "a ends", "b begins", "c begins", "c ends"]
    outcomes = background.take_outcomes()
    assert [type(outcome) for outcome in outcomes] == [type(None), OSError, type(None)]
    assert background.take_outcomes() == []


def test_process_that_ends_commits_what_was_begun(tmp_path):
    program = textwrap.dedent(
        f"""
        import time, pathlib, sys
        from lightning_modules.persist import Background
        from lightning_modules.commit import commit_text
        def job():
            time.sleep(0.5)
            commit_text(pathlib.Path({str(tmp_path / "done")!r}), "yes")
        Background().start(job)
        sys.exit(3)
        """
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 3
    assert (tmp_path / "done").read_text() == "yes"


def test_fault_points_do_nothing_unless_named(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    reach("anything")
    monkeypatch.setenv(VARIABLE, "other:kill,here:raise:2,here@7:exit")
    reach("here")
    with pytest.raises(RuntimeError, match="fault point"):
        reach("here")
    reach("here")


@pytest.mark.parametrize("text", ["name", "name:explode", ":kill", "name:kill:x", "name@x:kill"])
def test_fault_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match=rf"{VARIABLE} .* is no name\[@rank\]:action\[:nth\]"):
        parse_faults(text)


def test_temporary_names_differ_and_lie_beside(tmp_path):
    names = {temporary(tmp_path / "x") for _ in range(10)}
    assert len(names) == 10
    assert {name.parent for name in names} == {tmp_path}
    assert all(name.name.startswith("x.tmp-") for name in names)
