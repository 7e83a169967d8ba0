"""Sizes of images and masks."""

from hypothesis import given
from hypothesis import strategies as st

from datamodules.views import fitted


@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.integers(1, 400), st.integers(1, 400))
def test_a_fitted_size_keeps_both_limits_and_the_shape(shape, short, more):
    height, width = fitted(shape, short, short + more)
    assert min(height, width) <= short and max(height, width) <= short + more
    factor = min(short / min(shape), (short + more) / max(shape))
    assert abs(height - shape[0] * factor) <= 0.5 or height == 1
    assert abs(width - shape[1] * factor) <= 0.5 or width == 1
