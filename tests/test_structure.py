"""The house keeps its shape: imports point one way, files stay small, nothing private is committed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"mirrorla", "datamodules", "lightning_modules", "cluster", "benchmarks"}
ALLOWED = {
    "cluster": {"cluster", "yaml"},
    "mirrorla": {"mirrorla", "torch", "triton", "torchvision", "timm", "safetensors"},
    "datamodules": {
        *("datamodules", "torch", "torchvision", "timm", "webdataset", "numpy", "PIL"),
        *("sklearn", "rich", "fsspec", "yaml", "pycocotools"),
    },
    "lightning_modules": {
        *("lightning_modules", "mirrorla", "datamodules", "cluster", "torch", "torchvision", "timm"),
        *("lightning", "torchmetrics", "tensorboard", "jsonargparse", "matplotlib", "numpy", "yaml", "rich", "PIL"),
        *("safetensors", "tqdm", "deepspeed", "faster_coco_eval", "scipy"),
    },
}
MODULE_ONLY = {"datamodules/base_module.py": {"lightning"}, "datamodules/remote.py": {"aiohttp"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    wrong = {}
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | MODULE_ONLY.get(name, set()) | set(sys.stdlib_module_names)
        if extra := set(imports(path)) - allowed:
            wrong[name] = sorted(extra)
    assert sources(package) and wrong == {}


def test_files_stay_below_300_lines():
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for package in (*OURS, "tests")
        for path in sources(package)
        if (lines := len(path.read_text().splitlines())) > 300
    }
    assert long == {}


def test_importing_the_model_needs_neither_lightning_nor_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import mirrorla\n"
        "assert 'lightning' not in sys.modules and 'webdataset' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


def test_every_package_says_it_is_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in ALLOWED)
