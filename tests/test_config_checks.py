"""Bad configurations are refused in one line that names the nearest valid key."""

import re

import pytest

from lightning_modules.config_checks import (
    Setting,
    chosen_classes,
    command_settings,
    expand_configs,
    read_settings,
    refuse_foreign_classes,
    refuse_unknown_keys,
)
from lightning_modules.config_keys import KeyTree, load_class
from lightning_modules.errors import UsageError, is_users_mistake, nearest, one_line
from lightning_modules.parser import one_line_complaint

MODULE = "lightning_modules.classification.ClassificationModule"
OPTIONS = ["config", "run_dir", "trainer.max_steps", "trainer.max_epochs", "model", "data"]


@pytest.fixture(scope="module")
def tree():
    data = "datamodules.module.ClassificationDataModule"
    return KeyTree(OPTIONS, {"model": load_class(MODULE, "model"), "data": load_class(data, "data")})


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return path

    return write


def test_settings_know_their_line_and_leave_init_args_out(yaml_file):
    path = yaml_file("model:\n  class_path: a.B\n  init_args:\n    optim:\n      lr: 1.0\n")
    settings = read_settings(path)
    assert settings[-1] == Setting(("model", "optim", "lr"), "1.0", f"{path}:5")
    assert chosen_classes(settings) == {"model": "a.B"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
            "duplicate key trainer.max_epochs ({}:3); it is already given",
        ),
        ("model:\n  init_args:\n    x:\n    - y: 1\n      y: 2\n", "duplicate key model.x.y ({}:5)"),
        ("a: [1\n", "{}:2 is not valid YAML: expected ',' or ']'"),
        ("- 1\n", "{} must hold `key: value` lines"),
        ("a: \x00\n", "{} is not valid YAML"),
    ],
    ids=["duplicate", "duplicate-in-list", "syntax", "list", "control-character"],
)
def test_bad_files_are_refused(yaml_file, text, message):
    path = yaml_file(text)
    with pytest.raises(UsageError, match=re.escape(message.format(path))):
        read_settings(path)


def test_empty_file_sets_nothing(yaml_file):
    assert read_settings(yaml_file("# nothing\n")) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("trainer.max_step", "unknown key trainer.max_step (command line); nearest: trainer.max_steps"),
        ("run_dri", "unknown key run_dri (command line); nearest: run_dir"),
        (
            "model.optim.warmup_step",
            "unknown key model.optim.warmup_step (command line); nearest: model.optim.warmup_s",
        ),
        ("model.init_args.optim.lrr", "unknown key model.optim.lrr (command line); nearest: model.optim.lr"),
        ("model.layer_decay", "unknown key model.layer_decay (command line); nearest: model.optim.layer_decay"),
        ("model.backbone.mirror.powr", "nearest: model.backbone.mirror.power"),
        ("data.train_transform.hflop", "nearest: data.train_transform.hflip"),
        ("data.zzzz", "unknown key data.zzzz (command line); valid: allow_changed, batch_size, cache_dir"),
        ("zzzz", "unknown key zzzz (command line); valid: config, data, model, run_dir, trainer"),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_unknown_keys_name_the_nearest(tree, option, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        refuse_unknown_keys(command_settings([f"--{option}", "1"]), tree)


@pytest.mark.parametrize(
    "option",
    [
        *("trainer.max_steps", "model.optim.lr", "model.init_args.optim.lr", "model.class_path", "data.help"),
        *("trainer.max_epochs.anything", "model.backbone.mirror.init", "run_dir", "model"),
    ],
)
def test_valid_keys_pass(tree, option):
    refuse_unknown_keys(command_settings([f"--{option}=1"]), tree)


def test_keys_of_a_class_not_chosen_yet_pass():
    refuse_unknown_keys(command_settings(["--model.anything", "1"]), KeyTree(OPTIONS, {}))


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "os.path.Foo"],
        ["--trainer.callbacks+=evil.Call"],
        ["--trainer.logger.class_path=os.system"],
    ],
    ids=["model", "callbacks", "logger"],
)
def test_foreign_classes_are_refused(words):
    with pytest.raises(UsageError, match=r"\(command line\) is outside the allowed packages: lightning_modules, data"):
        refuse_foreign_classes(command_settings(words))


def test_foreign_classes_inside_lists_are_refused(yaml_file):
    path = yaml_file("trainer:\n  callbacks:\n  - class_path: os.system\n  - shutil.rmtree\n")
    with pytest.raises(
        UsageError, match=f"trainer.callbacks.class_path 'os.system' .{re.escape(str(path))}:3. is outside"
    ):
        refuse_foreign_classes(read_settings(path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lightning_modules.nothing.Module", "there is no module 'lightning_modules.nothing'"),
        (MODULE + "s", f"has no class 'ClassificationModules'; nearest: {MODULE}"),
        ("lightning_modules.classification.zzz", "has no class 'zzz'; it has ClassificationModule"),
    ],
    ids=["module", "misspelt", "none"],
)
def test_classes_that_do_not_exist(path, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_class(path, "model")


def test_config_names_become_paths(tmp_path, yaml_file):
    own, name = yaml_file("a: 1\n"), "digits/classification"
    argv, files = expand_configs(["--config", "digits/classification", f"--config={own}", "--x", name])
    assert files[0].name == "classification.yaml"
    assert files[1] == own
    assert argv == ["--config", str(files[0]), f"--config={own}", "--x", name]


NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'a.B':
        Parser key "optim.lr":
          Expected a <class 'float'>. Got value: abc
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'a': 1}"""
UNION = """Parser key "x":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value: three"""
LITERAL = """Parser key "m":
  Expected a typing.Literal['a', 'b']. Got value: c"""


@pytest.mark.parametrize(
    ("complaint", "line"),
    [
        ("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: two", "a.b: expected int, got 'two'"),
        (NESTED, "model.optim.lr: expected float, got 'abc'"),
        (UNION, "x: expected int or null, got 'three'"),
        (LITERAL, "m: expected one of 'a', 'b', got 'c'"),
        ("Errors:\n  - optim.lr -1 must be above 0\n  - Expected a <class 'NoneType'>", "optim.lr -1 must be above 0"),
        ("unrecognized arguments: extra", "unrecognized arguments: extra"),
    ],
    ids=["plain", "nested", "union", "literal", "ours", "other"],
)
def test_complaints_become_one_line(complaint, line):
    assert one_line_complaint(complaint) == line


def test_users_mistakes_are_ours_and_not_torchs(tmp_path):
    def caught(call):
        with pytest.raises(Exception) as info:
            call()
        return info.value

    from lightning_modules.optim import OptimConfig
    from lightning_modules.run_directory import RunDirectory

    assert is_users_mistake(caught(lambda: OptimConfig(lr=-1)))
    assert is_users_mistake(caught(lambda: RunDirectory(tmp_path / "none" / "\0").prepare()))
    assert not is_users_mistake(caught(lambda: int("x")))
    assert not is_users_mistake(KeyError("x"))
    import torch

    assert not is_users_mistake(caught(lambda: torch.optim.AdamW([])))


def test_messages_fit_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(FileNotFoundError(2, "No such file", "x.tar")) == "x.tar: No such file"
    assert one_line(ValueError()) == "ValueError"


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("fti", ["fit", "test"]) == "fit"
    assert nearest("zzz", ["fit", "test"]) is None
