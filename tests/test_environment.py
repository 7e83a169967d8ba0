"""What a run says it ran on, and what it must not say."""

import json

import pytest
import torch

from lightning_modules.environment import describe_environment, redact, redact_variables

CANARY = "c4n4ry"


@pytest.mark.parametrize(
    "text",
    [
        f"mirrorla fit --hub.token {CANARY}",
        f"mirrorla fit --db_password={CANARY} --data.path x",
        f"data:\n  hub_token: {CANARY}\n  path: x",
        f"s3 https://user:{CANARY}@host/bucket",
        f"--data.aws_secret_access_key {CANARY}",
    ],
    ids=["token", "password", "yaml", "url", "key"],
)
def test_secrets_are_hidden(text):
    assert CANARY not in redact(text)
    assert "<redacted>" in redact(text)


def test_harmless_text_is_kept():
    text = "mirrorla fit --config digits/classification --model.optim.lr 1e-3"
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
