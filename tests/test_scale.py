"Memory stays within the window, the batch or the recording at hand."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfdetr import diversity
from selfdetr.data import Batch, windows_of
from selfdetr.designs import make_objective
from selfdetr.feedback import FeedbackConfig
from selfdetr.losses import LossConfig
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.speed import fuse

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ModelConfig(channels=4, classes=3, dim=16, heads=2, hidden=16, queries=5, decoder_layers=2, norm_groups=4)
PEAKS = os.access("/proc/self/clear_refs", os.W_OK)
linux = pytest.mark.skipif(not PEAKS, reason="peaks of a process are read from /proc, where they can be set back")


def peak_apart(series, size, folder):
    "MB that one measurement of benchmarks/scale.py takes beyond what was there before, in a process of its own."
    command = [sys.executable, BENCHMARKS / "scale.py", "--smoke", "--one", series, str(size), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["megabytes"]


@linux
def test_a_training_step_of_the_paper_takes_under_a_third_of_what_it_may(tmp_path):
    assert 50 < peak_apart("paper", 128, tmp_path) < 1000  # 3 GB are allowed


@linux
def test_a_long_window_without_maps_does_not_hold_its_scores(tmp_path):
    steps, heads = 2048, 8
    scores = heads * steps**2 * 4 / 1e6
    assert peak_apart("window-maps", steps, tmp_path) > 1.5 * scores > 2 * peak_apart("window", steps, tmp_path)


def saved_for_backward(loss, feedback, fast):
    "Shapes of all that a training step keeps."
    torch.manual_seed(0)
    model, kept = SelfDETR(TINY), []
    if fast:
        fuse(model)
    target = {"segments": torch.tensor([[0.5, 0.2]]), "labels": torch.tensor([1])}
    batch = Batch(torch.randn(3, 33, 4), None, [target] * 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        objective = make_objective(model, loss, feedback)
        objective.total(objective(model, batch))
    return kept


@pytest.mark.parametrize("fast", [True, False])
def test_maps_are_kept_only_where_the_feedback_is_trained(fast):
    off = LossConfig(feedback_encoder=0, feedback_decoder=0)
    averaged, by_head = (3, 33, 33), (3, 2, 33, 33)
    trained, watched, without = (
        saved_for_backward(loss, feedback, fast)
        for loss, feedback in ((LossConfig(), FeedbackConfig()), (off, FeedbackConfig()), (off, None))
    )
    assert averaged in trained and averaged not in watched and averaged not in without
    if fast:  # probabilities and factors of dropout, in each of two layers
        assert [kept.count(by_head) for kept in (trained, watched, without)] == [4, 4, 4]


def test_the_report_takes_few_long_windows_at_a_time(monkeypatch):
    taken = []

    def watching(model, windows, indices):
        taken.append(len(indices))
        return {"encoder": torch.zeros(2, 1, len(indices))}

    monkeypatch.setattr(diversity, "_window_diversity", watching)
    for length in (128, 256, 512, 4096):
        windows = windows_of(np.zeros((20_000, 4), np.float32), length, 0.0)
        taken.clear()
        diversity.collapse_report(SelfDETR(TINY), windows)
        assert max(taken) == {128: 16, 256: 16, 512: 4, 4096: 1}[length]
