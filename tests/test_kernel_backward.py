"""The kernels in Triton's interpreter: output and every gradient against the float64 twin and the quadratic form."""

import pytest
import torch

from mirrorla.kernels import tiles
from tests.kernel_cases import CASES, DTYPES, SLOW, check, run_worker
from tests.kernel_worker import attend, poisoned


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_worker("whole", tmp_path_factory.mktemp("whole"), CASES)


@pytest.mark.parametrize("oracle", ["twin", "quadratic"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_are_the_oracles_up_to_rounding(name, oracle, results):
    check(CASES[name], oracle, *results[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", tiles.REGIMES)
def test_output_and_every_gradient_are_the_oracles_over_the_whole_grid(regime, dtype, tmp_path):
    names = [name for name, case in SLOW.items() if (case.regime, case.dtype) == (regime, dtype)]
    for name, found in run_worker("whole", tmp_path, names).items():
        check(SLOW[name], "twin", *found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_device_gives_what_the_oracles_give(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr("mirrorla.kernels.tiles.regime", lambda *shape: case.regime)
    monkeypatch.setattr("mirrorla.kernels.tiles.PART_TOKENS", 32)
    monkeypatch.setattr("mirrorla.kernels.launch.empty", poisoned)
    found, again = attend(case, "cuda"), attend(case, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    check(case, "twin", *(x.cpu() for x in found))
