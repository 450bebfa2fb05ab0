"""The name of a run: what changes it, and what does not. How detections are judged."""

import functools
import importlib
import inspect
import json
import sys

import numpy as np
import pandas as pd
import pytest

from selfdetr import data, feedback
from selfdetr.study import compute
from selfdetr.study.compute import _code_hash, _code_used, fit, measure

MAIN = """
from PACKAGE.losses import CHOICES, RATE, loss

def fit(data, how="square"):
    return CHOICES[how](loss(data.values)) * RATE
"""
LOSSES = """
import warnings
RATE = 0.1

class Config:
    beta: float = 2.0

def square(x):
    return x**2

def loss(values, config=Config()):
    "The loss."
    if not values:
        raise ValueError(advice("nothing"))
    return sum(values) * config.beta

def advice(text):
    return f"{text} is here; add it"

CHOICES = {"square": square}

def unused():
    return RATE
"""
APART = LOSSES.replace("def square(x):\n    return x**2\n", "from PACKAGE.powers import square\n")
SAME = {
    "a docstring": LOSSES.replace("The loss.", "What is lost."),
    "a comment": LOSSES.replace("    return x**2", "    # here\n    return  x**2"),
    "the text of an error": LOSSES.replace('advice("nothing")', '"nothing; " + advice("values")'),
    "what an error is made of": LOSSES.replace("is here; add it", "is there"),
    "more of an error": LOSSES.replace("        raise", "        text = str(values)\n        raise"),
    "a warning": LOSSES.replace("    return sum", '    warnings.warn("soon")\n    return sum'),
    "an annotation": LOSSES.replace("def square(x):", "def square(x: float) -> float:"),
    "an assertion": LOSSES.replace("    return x**2", "    assert x == x\n    return x**2"),
    "what is not used": LOSSES.replace("    return RATE", "    return 2 * RATE"),
    "the order": LOSSES.replace("RATE = 0.1\n", "").replace("def unused", "RATE = 0.1\ndef unused"),
    "another module": APART,
}
OTHER = {
    "a loss": LOSSES.replace("sum(values)", "max(values)"),
    "a constant": LOSSES.replace("RATE = 0.1", "RATE = 0.2"),
    "a default of a config": LOSSES.replace("beta: float = 2.0", "beta: float = 3.0"),
    "what a table names": LOSSES.replace("x**2", "x**3"),
    "a branch that returns before the error": LOSSES.replace("        raise", "        return 0\n        raise"),
    "when there is an error": LOSSES.replace("if not values", "if values"),
}


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    "The hash of a small package."
    monkeypatch.syspath_prepend(tmp_path)

    def hashed(name, losses):
        (tmp_path / name).mkdir()
        powers = "def square(x):\n    return x**2\n" if losses is APART else ""
        for module, text in {"__init__": "", "main": MAIN, "losses": losses, "powers": powers}.items():
            (tmp_path / name / f"{module}.py").write_text(text.replace("PACKAGE", name))
        return _code_hash(importlib.import_module(f"{name}.main").fit)

    yield hashed
    compute._definitions.cache_clear(), compute._definition.cache_clear()
    for name in [name for name in sys.modules if name.startswith("package_")]:
        del sys.modules[name]


@pytest.mark.parametrize("losses", SAME.values(), ids=SAME)
def test_wording_and_places_do_not_change_a_hash(hash_of, losses):
    assert losses != LOSSES and hash_of("package_a", LOSSES) == hash_of("package_b", losses)


@pytest.mark.parametrize("losses", OTHER.values(), ids=OTHER)
def test_what_computes_a_number_changes_a_hash(hash_of, losses):
    assert losses != LOSSES and hash_of("package_a", LOSSES) != hash_of("package_b", losses)


@pytest.fixture
def edit(monkeypatch):
    "Change the text of a module of the real package, as it is hashed."

    def change(name, old, new):
        module = importlib.import_module(f"selfdetr.{name}")
        text = inspect.getsource(module)
        assert old in text, "the test is older than the code"
        monkeypatch.setattr(inspect, "getsource", lambda _: text.replace(old, new))
        for part in ("_definitions", "_definition"):
            monkeypatch.setattr(compute, part, renewed(getattr(compute, part), module.__name__))

    return change


def renewed(cached, module):
    "What a cached function gives, but for a module that has changed, which is read once more."
    anew = functools.cache(cached.__wrapped__)
    return lambda name, *rest: (anew if name == module else cached)(name, *rest)


def hashes():
    return _code_hash.__wrapped__(fit), _code_hash.__wrapped__(fit, measure)


@pytest.mark.parametrize("module, old, new", [
    ("trainer", "there are no training windows;", "no windows:"),
    ("matcher", "Focal cost", "The focal cost"),
    ("data.dataset", "def load_dataset(", "def load_dataset(\n    _,\n"),
    ("resume", "def save(", "def save(\n    _,\n"),
    ("study.cache", "def seal(", "def seal(\n    _,\n"),
    ("plots", "def plot_table(", "def plot_table(\n    _,\n"),
])  # fmt: skip
def test_words_readers_and_files_change_no_name_of_the_package(edit, module, old, new):
    before = hashes()
    edit(module, old, new)
    assert hashes() == before


@pytest.mark.parametrize("module, old, new", [
    ("matcher", "classes: float = 6.0", "classes: float = 6.5"),
    ("losses", "1 - overlap", "1 + overlap"),
    ("segments", "def cw_to_se(", "def cw_to_se(\n    _,\n"),
    ("denoising", "class DINO(", "class DINO(object, "),
    ("data.windows", "def training_windows(", "def training_windows(\n    _,\n"),
    ("trainer", "batch: int = 16", "batch: int = 8"),
])  # fmt: skip
def test_training_code_changes_the_names(edit, module, old, new):
    before = hashes()
    edit(module, old, new)
    assert all(a != b for a, b in zip(hashes(), before))


def test_a_constant_changes_the_names(monkeypatch):
    before = hashes()
    monkeypatch.setattr(feedback, "EPS", 1e-6)
    assert all(a != b for a, b in zip(hashes(), before))


@pytest.mark.parametrize("module, old, new", [
    ("inference", ".topk(", ".bottomk("),
    ("evaluation", "def evaluate(", "def evaluate(\n    _,\n"),
    ("study.compute", "detections = detect_dataset(", "detections = 0 * detect_dataset("),
])  # fmt: skip
def test_measuring_code_changes_the_source_but_not_the_name_of_a_run(edit, module, old, new):
    (training, source), _ = hashes(), edit(module, old, new)
    after = hashes()
    assert after[0] == training and after[1] != source


def test_what_is_hashed_is_the_same_in_every_process():
    used = _code_used(fit, measure)
    assert not [name for name, text in used if " at 0x" in text]  # the address of an object
    assert not {name for name, text in used if text.startswith("selfdetr")}  # a module: its names are not followed


def test_labels_that_are_left_out_count_in_no_judgement(tmp_path):
    "With video scores the annotation file is judged: of an instance `Ambiguous`, and of one that the folder ignores."
    rows = [("run", 1, 3), ("jump", 4, 6), ("Ambiguous", 6, 8), ("rest", 8, 9)]
    instances = [{"label": label, "segment": [start, end]} for label, start, end in rows]
    entry = {"duration": 10.0, "fps": 10, "annotations": instances}
    database = {name: entry | {"subset": name} for name in ("training", "test")}
    (tmp_path / "features").mkdir()
    for name in database:
        np.save(tmp_path / "features" / f"{name}.npy", np.ones((100, 4), np.float32))
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "scores.json").write_text(json.dumps({"results": {}, "class": []}))
    settings = {"stride": 1, "snippet": 1, "video_scores": "scores.json"}
    found = pd.DataFrame(rows[:2], columns=["label", "start", "end"]).assign(video="test", score=1.0)
    for more, classes in ({}, ["jump", "rest", "run"]), ({"ignore_labels": ["Ambiguous", "rest"]}, ["jump", "run"]):
        (tmp_path / "dataset.json").write_text(json.dumps(settings | more))
        result = compute.judge_detections(found, data.load_dataset(tmp_path))
        assert sorted(result.per_class.index) == classes
        assert result.average == pytest.approx(2 / len(classes))
