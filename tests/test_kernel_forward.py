"""States in steps and in parts, and the pure functions that decide which kernel runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrorla.kernels import launch, tiles
from tests.kernel_cases import PARTS, check, run_worker

SIZES = st.integers(1, 2**20)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return run_worker("steps", tmp_path_factory.mktemp("steps"), PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_state_and_apply_are_the_oracles_in_any_number_of_parts(name, steps):
    found = [value for key, value in steps.items() if key.split("/")[0] == name]
    assert len(found) == 3
    for out, *grads in found:
        check(PARTS[name], "twin", out, *grads)


def test_regimes_follow_the_shape():
    assert tiles.regime(128, 49, 49, 24, 132) == "chip"
    assert tiles.regime(1, 256, 256, 1, 132) == "chip"
    assert tiles.regime(1, 15, 257, 1, 132) == "split"
    assert tiles.regime(88, 3136, 49, 3, 132) == "head"
    assert tiles.regime(87, 3136, 49, 3, 132) == "split"


@given(
    heads=st.integers(1, 4096), tokens=SIZES, d=st.sampled_from([8, 32, 64, 128]), tile=st.sampled_from([16, 32, 64])
)
def test_the_workspace_of_parts_stays_below_16_mib_and_parts_cover_the_tokens(heads, tokens, d, tile):
    numbers = d * d + d
    chunk = tiles.part_tokens(heads, tokens, numbers, tile)
    parts = -(-tokens // chunk)
    assert chunk % tile == 0
    assert chunk > 0
    assert parts == 1 or 4 * parts * heads * numbers <= 16 * 2**20


@given(tokens=SIZES)
def test_parts_do_not_fall_below_their_least_size(tokens):
    chunk = tiles.part_tokens(1, tokens, 0, 64)
    assert chunk >= tokens or chunk >= tiles.PART_TOKENS // 2


@pytest.mark.parametrize("width,block", [(8, 16), (16, 16), (24, 32), (72, 128), (96, 128), (128, 128)])
def test_widths_are_padded_to_powers_of_two(width, block):
    assert tiles.padded(width) == block


@pytest.mark.parametrize("op", tiles.TABLE)
def test_at_most_eight_tiles_are_shipped_for_an_operation_and_dtype(op):
    for dtype, table in tiles.TABLE[op].items():
        rows = [*table.values(), *tiles.AMPERE[op][dtype].values()]
        assert len({tile for row in rows for tile in row}) <= 8
        assert set(table) == {16, 32, 64, 128}


def test_devices_before_ampere_and_float64_are_not_served():
    assert tiles.hindrance((8, 0), torch.bfloat16, 128, 128) is None
    assert tiles.hindrance((10, 0), torch.float16, 8, 128) is None
    assert tiles.hindrance(None, torch.float32, 128, 128) is None
    assert tiles.hindrance((8, 9), torch.float32, 64, 64) is None
    assert tiles.hindrance((9, 0), torch.float32, 48, 64) is None
    assert tiles.hindrance((7, 5), torch.float16, 32, 32) == "no kernel serves float16 on compute capability 7.5"
    assert tiles.hindrance((9, 0), torch.float64, 32, 32) == "no kernel serves float64 on compute capability 9.0"
    too_wide = "no kernel serves float32 heads of 96 channels on compute capability 8.6"
    assert tiles.hindrance((8, 6), torch.float32, 32, 96) == too_wide
    outside = "heads of 4 and 130 channels are outside 8 to 128"
    assert tiles.hindrance((9, 0), torch.float16, 4, 130) == tiles.hindrance(None, torch.float16, 4, 130) == outside


def test_a_last_stride_other_than_one_is_refused_with_the_tensors_name():
    with pytest.raises(ValueError, match=r"k of shape \(1, 2, 3, 8\) has last stride 3: the kernels read stride 1"):
        launch.rows("k", torch.zeros(1, 2, 8, 3).transpose(2, 3))
