"""What a run says it ran on, and what it must not say."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_modules import environment
from lightning_modules.environment import MAX_DIFF, describe_environment, redact, redact_variables

CANARY = "c4n4ry"


@pytest.mark.parametrize(
    "text",
    [
        f"mirrorla fit --hub.token {CANARY}",
        f"mirrorla fit --db_password={CANARY} --data.path x",
        f"data:\n  hub_token: {CANARY}\n  path: x",
        f"s3 https://user:{CANARY}@host/bucket",
        f"--data.aws_secret_access_key {CANARY}",
        f"+hub_token: {CANARY}",
        f"-    api_key: {CANARY}",
        f'+API_KEY = "{CANARY}"',
        f'{{"path": "x", "password": "{CANARY}"}}',
        f"connect(host, password='{CANARY}')",
    ],
    ids=["token", "password", "yaml", "url", "key", "diff", "diff-nested", "code", "json", "argument"],
)
def test_secrets_are_hidden(text):
    assert CANARY not in redact(text)
    assert "<redacted>" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "mirrorla fit --config digits/classification --model.optim.lr 1e-3",
        "+    manifest = replace(draft.manifest, token=draft.token())",
        "    host:\n      class_token: false\n      positions: null\n",
        "mirrorla fit --model.backbone.host.class_token true --trainer.max_steps 2",
        '-    name = "tokens over time"\n+tokens = 64\n',
    ],
)
def test_harmless_text_is_kept(text):
    assert redact(text) == text


def test_variables_are_chosen_and_hidden():
    found = redact_variables({"SLURM_JOB_ID": "7", "HF_TOKEN": CANARY, "MY_SECRET": CANARY, "RANK": "0", "HOME": "/h"})
    assert found == {"HF_TOKEN": "<redacted>", "RANK": "0", "SLURM_JOB_ID": "7"}


def test_description_is_plain_and_complete(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    environment = describe_environment(["mirrorla", "fit", "--x.token", CANARY])
    text = json.dumps(environment)
    assert CANARY not in text
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["command"] == "mirrorla fit --x.token <redacted>"
    assert set(environment["git"]) == {"commit", "clean"}


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """The module as it runs from another checkout: a repository with one commit of it and of a configuration."""
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(Path(environment.__file__), package / "environment.py")
    (package / "settings.yaml").write_text("batch: 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "first")
    spec = importlib.util.spec_from_file_location("checked_out", package / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return package, module


def test_a_clean_checkout_has_a_commit_and_no_changes(checkout):
    package, module = checkout
    assert module.describe_environment(["x"])["git"] == {"commit": git(package, "rev-parse", "HEAD"), "clean": True}
    assert module.uncommitted_changes() is None


@pytest.mark.parametrize("staged", [False, True])
def test_uncommitted_changes_are_a_diff_that_applies_with_secrets_hidden(checkout, tmp_path, staged):
    package, module = checkout
    (package / "settings.yaml").write_text("batch: 2\n")
    if staged:
        git(package, "add", "settings.yaml")
    assert module.describe_environment(["x"])["git"]["clean"] is False
    diff = module.uncommitted_changes()
    (tmp_path / "changes.diff").write_text(diff + "\n")
    git(package, "reset", "-q", "--hard")
    git(tmp_path, "apply", "changes.diff")
    assert (package / "settings.yaml").read_text() == "batch: 2\n"
    (package / "settings.yaml").write_text(f"batch: 2\nurl: https://user:{CANARY}@host/x\nhub_token: {CANARY}\n")
    assert CANARY not in module.uncommitted_changes() and "+batch: 2" in module.uncommitted_changes()


def test_a_huge_diff_is_cut_and_says_so(checkout):
    package, module = checkout
    (package / "settings.yaml").write_text("x\n" * MAX_DIFF)
    changes = module.uncommitted_changes()
    assert len(changes) < MAX_DIFF + 100 and changes.endswith(" more characters]")


def test_code_that_git_does_not_track_has_neither_commit_nor_changes(checkout):
    package, module = checkout
    git(package, "rm", "-q", "--cached", "environment.py")
    git(package, "commit", "-q", "-m", "without it")
    assert module.describe_environment(["x"])["git"] == {"commit": None, "clean": None}
    assert module.uncommitted_changes() is None
