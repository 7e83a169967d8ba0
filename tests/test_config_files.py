import pytest

from mirrorla.config_files import find_config, packaged_configs


def test_a_path_wins_and_names_work_with_and_without_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    assert find_config("mine.yaml").resolve() == tmp_path / "mine.yaml"
    assert find_config("imagenet/mirrorla_tiny") == find_config("imagenet/mirrorla_tiny.yaml")
    assert find_config("imagenet/mirrorla_tiny").is_file()
    assert "imagenet/mirrorla_tiny" in packaged_configs()


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean imagenet/mirrorla_tiny"):
        find_config("imagenet/mirorla_tiny")
    with pytest.raises(FileNotFoundError, match="packaged configs: "):
        find_config("qqqqqq")
