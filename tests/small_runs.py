"""A run that takes a second, what a study of such runs is, and how two runs are compared."""

import json
from pathlib import Path

import pandas as pd
import pytest

from selfdetr import study
from selfdetr.study import compute

compute.training_hash(), compute.source_hash()  # of the code as it is, before a test replaces a part of it

SMALL = {"model.dim": 16, "model.heads": 2, "model.norm_groups": 2, "model.hidden": 16, "model.queries": 6,
         "train.epochs": 4, "train.batch": 3}  # fmt: skip
ROWS = [
    {"name": "baseline", "overrides": {**SMALL, "loss.feedback_encoder": 0, "loss.feedback_decoder": 0}, "paper": None},
    {"name": "both", "overrides": SMALL, "paper": {"0.5": 60.0, "average": 56.7}},
]


def run_again(finished, data, runs_root):
    "The same spec, computed or found."
    return study.run(finished.spec, data, runs_root=runs_root, device="cpu", progress=False)


def make_table(rows, seeds, folder, runs_root, **options):
    options = dict(dataset=str(folder), profile="smoke", device="cpu", workers=1, progress=False) | options
    return study.table(rows, seeds, runs_root=runs_root, **options)


def visible(folder):
    "What a user sees in a runs folder: lock files and unfinished work are hidden."
    return sorted(path.name for path in Path(folder).glob("[!.]*"))


def timeless(run):
    "The metrics without times."
    return {name: value for name, value in run.metrics.items() if not name.startswith("seconds")}


def strict_json(path):
    "The content of a file without NaN and Infinity, which are no JSON."
    return json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{path.name} holds {text}"))


def assert_same_run(a, b):
    assert timeless(a) == timeless(b)
    histories = (run.history.drop(columns="seconds") for run in (a, b))
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for name in ("checkpoint.safetensors", "detections.json", "detector.json", "config.json", "spec.json"):
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), name


def flip(path, place):
    "Flip one bit of a file, at a part of its length."
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
