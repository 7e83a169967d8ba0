"""Checkpoints that the real verbs refuse in one line: crafted, remote, linked, or of another kind of strategy.

Crafted files come from somebody who can write manifests: every hash fits, and still nothing in them is executed.
"""

import importlib.util
import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from lightning_modules.checkpoint import list_checkpoints, read_manifest
from lightning_modules.commit import hash_file
from lightning_modules.manifest import MANIFEST, FileRecord, write_manifest

_spec = importlib.util.spec_from_file_location("verbs", Path(__file__).with_name("verbs.py"))
_verbs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_verbs)

ZERO = pytest.param("zero2", marks=pytest.mark.slow)
STRATEGIES = ["fsdp2", ZERO]


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def raw(evil):
    return pickle.dumps(evil)


def zipped(evil):
    stream = io.BytesIO()
    torch.save({"global_step": 2, "callbacks": evil}, stream)
    return stream.getvalue()


def legacy(evil):
    stream = io.BytesIO()
    torch.save({"global_step": 2, "state_dict": evil}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def hidden(evil):
    """Harmless when looked at from the beginning: a second pickle follows the first."""
    return pickle.dumps({"global_step": 2}) + pickle.dumps(evil)


FORMS = {form.__name__: form for form in (raw, zipped, legacy, hidden)}
SOME = ["zipped", "raw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("legacy", "hidden"))]


@pytest.fixture(scope="module")
def verb(digits, tmp_path_factory):
    """A function that runs a verb on the digits with a tiny model."""
    with _verbs.Verbs(tmp_path_factory.mktemp("verbs")) as verbs:

        def start(name, run, *words, strategy="auto", **environment):
            options = ["--config", "digits/classification", "--data.path", str(digits), "--run_dir", str(run)]
            options += ["--model.ema_decay", "null", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
            options += ["--trainer.strategy", strategy]
            if name == "fit":
                options += ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0"]
            return verbs(name, *options, *words, **environment)

        start.verbs = verbs
        yield start


@pytest.fixture(scope="module")
def runs(verb, tmp_path_factory):
    """A function that gives a run of two steps under a strategy."""
    made = {}

    def made_under(strategy):
        if strategy not in made:
            run = tmp_path_factory.mktemp(strategy) / "run"
            options = ["--checkpoint.every_n_steps", "2", "--trainer.max_steps", "2"]
            ended = verb("fit", run, *options, strategy=strategy, MASTER_PORT="0")
            assert ended.code == 0, ended.told
            made[strategy] = run
        return made[strategy]

    return made_under


@pytest.fixture
def copy(runs, tmp_path):
    """A function that copies such a run; returns it and its checkpoint."""

    def copied(strategy):
        shutil.copytree(runs(strategy), tmp_path / "run")
        return tmp_path / "run", list_checkpoints(tmp_path / "run" / "checkpoints")[-1]

    return copied


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Evil(path)))  # the payload is a live one
    assert path.exists()


def reseal(path):
    """Make the manifest fit the folder's files."""
    manifest = read_manifest(path)
    (path / MANIFEST).unlink()
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[file.relative_to(path).as_posix()] = FileRecord(file.stat().st_size, hash_file(file))
    write_manifest(path, replace(manifest, files=files))


def put(path, name, content):
    assert (path / name).is_file()
    (path / name).write_bytes(content)
    reseal(path)


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_pickles_in_a_checkpoint_are_refused_by_every_verb(verb, copy, canary, tmp_path, name, form):
    run, path = copy("auto")
    put(path, name, FORMS[form](Evil(canary)))
    words = {"fit": "last", "validate": path, "predict": run} if form == "zipped" else {"fit": "last"}
    for verb_name, word in words.items():
        ended = verb(verb_name, run, "--ckpt_path", word)
        assert (ended.code, str(path / name) in ended.refusal) == (2, True), ended.told
    ended = verb.verbs("checkpoints", path, "--convert", tmp_path / "w.safetensors")
    assert (ended.code, str(path / name) in ended.refusal) == (2, True), ended.told
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pickles_among_the_parts_of_a_sharded_checkpoint_are_refused(verb, copy, canary, tmp_path, strategy):
    run, path = copy(strategy)
    names = [name for name in read_manifest(path).files if name.startswith("sharded/") and not name.endswith(".py")]
    assert len(names) >= 3
    for name in names:
        whole = (path / name).read_bytes()
        put(path, name, zipped(Evil(canary)))
        ended = verb("fit", run, "--ckpt_path", "last", strategy=strategy)
        assert (ended.code, str(path) in ended.refusal) == (2, True), (name, ended.told)
        for form in FORMS.values():
            put(path, name, form(Evil(canary)))
            ended = verb.verbs("checkpoints", path, "--convert", tmp_path / "w.safetensors")
            assert (ended.code, str(path) in ended.refusal) == (2, True), (name, form, ended.told)
        put(path, name, whole)
    assert verb("fit", run, "--ckpt_path", "last", strategy=strategy).code == 0


def test_an_object_inside_a_part_of_fsdp_is_refused(verb, copy, canary, tmp_path):
    """Well-formed metadata that says: these values are objects; torch would unpickle them."""
    run, path = copy("fsdp2")
    state = torch.distributed.checkpoint
    reader = state.FileSystemReader(path / "sharded")
    names = [name for name in reader.read_metadata().state_dict_metadata if name.startswith("state_dict.")]
    assert names
    meta = (path / "sharded" / "meta.pt").read_bytes()
    shutil.rmtree(path / "sharded")
    with pytest.warns(UserWarning, match="no process group|single process|not initialized"):
        objects = {"state_dict": {name.removeprefix("state_dict."): Evil(canary) for name in names}}
        state.save(objects, checkpoint_id=path / "sharded", no_dist=True)
    (path / "sharded" / "meta.pt").write_bytes(meta)
    reseal(path)
    for ended in (
        verb("fit", run, "--ckpt_path", "last", strategy="fsdp2"),
        verb.verbs("checkpoints", path, "--convert", tmp_path / "w.safetensors"),
    ):
        assert ended.code in (1, 2) and str(path) in ended.refusal, ended.told


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pickles_as_pretrained_weights_are_refused(verb, canary, tmp_path, suffix, form):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(FORMS[form](Evil(canary)))
    ended = verb("fit", tmp_path / "run", "--model.backbone.pretrained", path)
    assert (ended.code, f"pretrained weights '{path}'" in ended.refusal) == (2, True), ended.told


def test_pickles_in_the_place_of_texts_are_texts(verb, copy, canary):
    run, path = copy("auto")
    latest = path.parent / "LATEST"
    for place in (latest, path.parent / "best.json", run / "config.yaml", run / "attempts.jsonl"):
        place.write_bytes(raw(Evil(canary)))
        ended = verb("validate", run, "--ckpt_path", latest if place == latest else "last")
        assert (ended.code, "Traceback" in ended.told) == (2 if place == latest else 0, False), ended.told
    (path / MANIFEST).write_bytes(raw(Evil(canary)))
    ended = verb("validate", run, "--ckpt_path", path)
    assert ended.code == 2 and MANIFEST in ended.refusal


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/step_00000002", "s3://bucket/run"])
def test_remote_checkpoints_are_refused_before_anything_is_fetched(verb, tmp_path, address):
    ended = verb("fit", tmp_path / "run", "--ckpt_path", address)
    assert ended.code == 2
    assert f"ckpt_path '{address}' is a remote address; copy the directory here first" in ended.refusal
    assert not (tmp_path / "run").exists()


def test_remote_weights_are_refused_before_anything_is_fetched(verb, tmp_path):
    ended = verb("fit", tmp_path / "run", "--model.backbone.pretrained", "http://127.0.0.1:9/w.pt")
    assert ended.code == 2 and "pretrained weights" in ended.refusal


def test_links_out_of_a_run_are_never_followed(verb, copy, tmp_path):
    run, path = copy("auto")
    outside = tmp_path / "outside" / "step_00000009"
    shutil.copytree(path, outside)
    manifest = read_manifest(path)
    (outside / MANIFEST).unlink()
    write_manifest(outside, replace(manifest, step=9))
    link = path.with_name("step_00000009")
    link.symlink_to(outside)
    ended = verb("validate", run, "--ckpt_path", link)
    assert ended.code == 2 and f"{link} is a symbolic link, which is never followed" in ended.refusal
    ended = verb("validate", run, "--ckpt_path", "last")
    assert ended.code == 0 and "symbolic link" in ended.told and f"checkpoint     {path}" in ended.told
    (tmp_path / "elsewhere").write_text(path.name)
    (path.parent / "LATEST").unlink()
    (path.parent / "LATEST").symlink_to(tmp_path / "elsewhere")
    ended = verb("validate", run, "--ckpt_path", path.parent / "LATEST")
    assert ended.code == 2 and "LATEST is a symbolic link, which is never followed" in ended.refusal
    assert outside.is_dir()


@pytest.mark.parametrize("name", ["../../outside.pt", "/etc/passwd", "sharded/../../x"])
def test_a_manifest_that_names_files_elsewhere_is_refused(verb, copy, name):
    run, path = copy("auto")
    manifest = read_manifest(path)
    (path / MANIFEST).unlink()
    write_manifest(path, replace(manifest, files={**manifest.files, name: manifest.files["state.pt"]}))
    ended = verb("fit", run, "--ckpt_path", path)
    assert ended.code == 2 and "does not lie plainly in its folder" in ended.refusal


@pytest.mark.parametrize(
    ("written", "resumed"),
    [
        ("auto", "fsdp2"),
        ("fsdp2", "auto"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("auto", "zero2"), ("zero2", "auto"), ("fsdp2", "zero2"))
        ),
    ],
)
def test_a_checkpoint_of_another_kind_of_strategy_is_refused_with_the_mend(verb, copy, tmp_path, written, resumed):
    names = {"auto": "ddp or one device", "fsdp2": "fsdp2", "zero2": "zero1, zero2 or zero3"}
    run, path = copy(written)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    ended = verb("fit", run, "--ckpt_path", "last", strategy=resumed)
    assert ended.code == 2, ended.told
    assert (
        f"checkpoint {path} was written under trainer.strategy {names[written]}, this is {names[resumed]}; continue "
        "it under that one, or start a new run from its weights: mirrorla checkpoints" in ended.refusal
    )
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    weights = tmp_path / "w.safetensors"  # the mend works
    assert verb.verbs("checkpoints", path, "--convert", weights).code == 0
    ended = verb("fit", tmp_path / "new", "--model.backbone.pretrained", weights, strategy=resumed)
    assert ended.code == 0, ended.told
