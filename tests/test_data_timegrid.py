"""Feature steps and seconds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdetr.data.files import DataError
from selfdetr.data.timegrid import TimeGrid


@given(fps=st.floats(0.5, 240), stride=st.floats(0.5, 64), snippet=st.floats(0.5, 64),
       half_steps=st.lists(st.integers(-10, 2_000_000), min_size=1, max_size=50))
def test_steps_and_seconds_undo_each_other_exactly(fps, stride, snippet, half_steps):
    grid, steps = TimeGrid(fps, stride, snippet), np.array(half_steps) / 2
    seconds = grid.to_seconds(steps)
    assert np.array_equal(grid.to_steps(seconds), steps)
    assert np.array_equal(grid.to_seconds(grid.to_steps(seconds)), seconds)


@pytest.mark.parametrize("fps", [5, 10, 23.976, 24, 25, 29.97, 29.983, 30, 50, 59.94, 60])
@pytest.mark.parametrize("stride, snippet", [(1, 1), (3, 1), (4, 16), (8, 16), (16, 16), (5, 7)])
def test_every_step_of_an_hour_comes_back(fps, stride, snippet):
    grid, steps = TimeGrid(fps, stride, snippet), np.arange(int(3600 * fps / stride))
    assert np.array_equal(grid.to_steps(grid.to_seconds(steps)), steps)
    assert grid.to_steps(grid.to_seconds(7)) == 7 and isinstance(grid.to_steps(0.5), float)


@given(seconds=st.floats(0, 1e5), fps=st.floats(0.5, 240), stride=st.floats(0.5, 64))
def test_any_time_comes_back(seconds, fps, stride):
    grid = TimeGrid(fps, stride, 16)
    # The snap to a step moves a time by no more than one part in 10^9.
    assert grid.to_seconds(grid.to_steps(seconds)) == pytest.approx(seconds, rel=2e-9, abs=1e-9 * (stride + 16) / fps)


def test_the_formula():
    assert TimeGrid(30, 4, 16).to_seconds(5) == (5 * 4 + 8) / 30
    assert TimeGrid(10).to_seconds(np.array([[0, 1], [2, 3]])).tolist() == [[0.05, 0.15], [0.25, 0.35]]


@pytest.mark.parametrize("field", ["fps", "stride", "snippet"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "30", None, True])
def test_impossible_grids_are_refused(field, value):
    with pytest.raises(DataError, match=field):
        TimeGrid(**{"fps": 30, field: value})
