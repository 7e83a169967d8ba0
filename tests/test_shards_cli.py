"""The command line of `mirrorla shards`: its options, its help and its refusals."""

import re

import pytest

from lightning_modules import cli
from lightning_modules.shards_cli import commands, underscored


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("--shard-size-mib", "--shard_size_mib"),
        ("--shard_size-mib=a-b", "--shard_size_mib=a-b"),
        ("--a-b", "--a_b"),
        ("data/my-folder", "data/my-folder"),
        ("-1", "-1"),
        ("--", "--"),
    ],
)
def test_dashes_and_underscores_are_the_same_in_an_option_only(word, known):
    assert underscored(word) == known


@pytest.mark.parametrize("option", [["--shard-size-mib", "0.4"], ["--shard_size_mib=0.4"]])
def test_pack_takes_options_by_name(tmp_path, option, capsys):
    assert cli.main(["shards", "pack", "--source", "digits", "--out", str(tmp_path / "my-digits"), *option]) == 0
    assert len(list((tmp_path / "my-digits" / "train").glob("*.tar"))) == 8


@pytest.mark.parametrize("name", commands())
def test_help_shows_every_option_once_with_its_default_and_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mirrorla shards {name} ")
    assert "Args:" not in text
    assert re.findall(r"--\S*_\S*", text) == [], "options are shown with dashes"
    assert text.count("examples:\n  mirrorla shards " + name) == 1
    options = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(options) == len(set(options))
    for option in text.partition("examples:")[0].split("\n  --")[1:]:
        assert re.search(r"required|default:\s", option), option


def test_the_overview_lists_every_command(capsys):
    assert cli.main(["shards", "--help"]) == 0
    text = capsys.readouterr().out
    for name in commands():
        assert f"\n  {name} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pak"], "mirrorla shards: error: there is no command 'pak'; did you mean 'pack'?"),
        (["zzz"], "there is no command 'zzz'; choose one of pack, index, verify, info"),
        (["pack", "--source", "digits"], "out"),
        (["pack", "digits", "somewhere"], "error: "),
        (["pack", "--source", "digits", "--out", "x", "--resise", "3"], "unrecognized arguments: --resise"),
        (["info", "nowhere"], "dataset folder nowhere does not exist"),
        (["pack", "--source", "digits", "--out", "x", "--shard-size-mib", "0"], "--shard-size-mib is 0.0; it must be"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["shards", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
