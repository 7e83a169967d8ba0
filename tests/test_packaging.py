"""A wheel carries all four packages, their typing marks and the configs, and works without the checkout."""

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new environment with the wheel in it; it borrows the dependencies, and not the checkout, of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    home = folder / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (target,) = (home / "lib").glob("python*/site-packages")
    # A plain path: the .pth of the editable checkout beside the dependencies is not followed.
    (target / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return wheel, home / "bin"


def run(program, *arguments, folder, timeout=300):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(program), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_the_wheel_holds_packages_typing_marks_and_configs(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    for package in ("mirrorla", "datamodules", "lightning_modules", "cluster"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert "mirrorla/configs/digits/classification.yaml" in names
    assert not any(name.startswith(("tests", "benchmarks", ".")) for name in names)


def test_it_runs_away_from_the_checkout(installed, tmp_path):
    where = run(installed[1] / "python", "-c", "import mirrorla; print(mirrorla.__file__)", folder=tmp_path)
    assert str(ROOT / "mirrorla") not in where.stdout and "site-packages" in where.stdout


def test_it_lists_the_models(installed, tmp_path):
    done = run(installed[1] / "mirrorla", "models", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mirrorla_large" in done.stdout and "mirror x4 (linear)" in done.stdout


def test_it_trains_a_packaged_config(installed, tmp_path):
    done = run(
        *(installed[1] / "mirrorla", "fit", "--config", "digits/classification", "--trainer.max_steps", "2"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits-classification" / "config.yaml").is_file()
