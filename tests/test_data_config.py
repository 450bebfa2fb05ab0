"""A configuration comes back from its JSON, and anything else is a DataError."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdetr.data.config import config_from
from selfdetr.data.files import DataError
from selfdetr.data.releases import Settings

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
                    max_leaves=8)


@dataclass(frozen=True)
class Inner:
    kind: Literal["step", "cosine"] = "step"
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    milestones: tuple[int, ...] = ()
    limit: float | None = None
    names: str | tuple[str, ...] = "a"
    pair: tuple[str, float] = ("a", 1.0)
    on: bool = False


small = st.integers(-(10**9), 10**9)
outers = st.builds(
    Outer, small, st.builds(Inner, st.sampled_from(["step", "cosine"]), st.floats(-1e9, 1e9)),
    st.lists(small, max_size=3).map(tuple), st.none() | st.floats(-1e9, 1e9),
    st.text() | st.lists(st.text(), max_size=3).map(tuple), st.tuples(st.text(), st.floats(-1e9, 1e9)), st.booleans())


@given(outers)
def test_a_configuration_comes_back_from_its_json(config):
    assert config_from(Outer, json.loads(json.dumps(asdict(config))), "x.json") == config


@given(st.dictionaries(st.sampled_from(list(asdict(Outer(1)))), JSON))
def test_other_json_is_refused_in_one_line_that_names_the_file(values):
    try:
        again = config_from(Outer, values, "x.json")
    except DataError as error:
        assert str(error).startswith("x.json: ") and "; " in str(error) and "\n" not in str(error)
    else:
        assert config_from(Outer, json.loads(json.dumps(asdict(again))), "x.json") == again


@pytest.mark.parametrize("values, words", [
    ({"steps": 1, "inner": {"kind": "stap"}}, "x.json: inner: kind is 'stap'; did you mean 'step'? It is one of step"),
    ({"steps": 1, "inner": {"knd": "step"}}, "x.json: inner: unknown field 'knd'; did you mean 'kind'?"),
    ({"steps": 1, "limit": "3"}, "x.json: limit is '3'; write a finite number"), ({}, "x.json: has no steps; write it"),
    ({"steps": True}, "x.json: steps is True; write a whole number"),
    ({"steps": 1, "pair": ["a"]}, "x.json: pair is ['a']; write a list of 2")])
def test_the_message_names_field_value_and_choices(values, words):
    with pytest.raises(DataError) as caught:
        config_from(Outer, values, "x.json")
    assert str(caught.value).startswith(words)


def test_settings_take_a_whole_number_for_any_number():
    assert config_from(Settings, {"fps": 25, "subsets": {"train": ["a", "b"]}}, "").subsets.train == ("a", "b")
    assert isinstance(config_from(Settings, {"fps": 25}, "").fps, float)


def test_a_whole_number_that_is_too_large_is_said_to_be_that():
    with pytest.raises(DataError, match=r"steps is 10{13}; write a whole number, no larger than 1e\+12"):
        config_from(Outer, {"steps": 10**13}, "x.json")
