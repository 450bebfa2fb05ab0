"""Feature steps and seconds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdetr.data.files import DataError
from selfdetr.data.timegrid import TimeGrid, parse_time


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


@pytest.mark.parametrize("fps, nominal", [(24000 / 1001, 24), (25, 25), (30000 / 1001, 30), (60000 / 1001, 60)])
def test_time_codes_count_whole_frames_a_second_or_drop_numbers(fps, nominal):
    hour = 3600 * nominal / fps  # 3603.6 s at the rates of television: every frame has a number
    assert parse_time("01:00:00:00", fps) == pytest.approx(hour, abs=1e-9)
    assert parse_time("01:00:00:10", fps) == pytest.approx(hour + 10 / fps, abs=1e-9)
    assert parse_time("01:00:00;10", fps) == pytest.approx(3600 + 10 / fps, abs=1e-9)
    with pytest.raises(DataError, match="is none at"):
        parse_time(f"0:00:00:{nominal}", fps)


def test_a_rate_as_measured_is_nearly_the_nominal_one():
    assert parse_time("01:00:00:00", 25.001) == pytest.approx(3600, abs=0.2)


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("text", ["{}:00", "{}:00:00", "{}:00:00:00", "0:00:00:{}", "{}", "0:{}"])
def test_a_time_of_many_digits_is_refused(text, digits):
    with pytest.raises(DataError, match="time '9|time '0:"):
        parse_time(text.format("9" * digits), 25.0)
