"""Windows: every step is in one, an instance belongs where three quarters of it lie, and times come back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfdetr.data import windows
from selfdetr.data.dataset import Dataset, Video, load_dataset
from selfdetr.data.files import DataError
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import training_windows, window_starts, windows_of
from selfdetr.data.windows import test_windows as windows_for_testing


@given(steps=st.integers(1, 700), length=st.integers(1, 150), overlap=st.sampled_from([0, 0.25, 0.5, 0.75, 0.9]))
def test_windows_cover_every_step_with_no_window_too_many(steps, length, overlap):
    for training in (True, False):
        start = window_starts(steps, length, overlap, shift_last=training)
        valid = np.minimum(length, steps - start)
        assert start[0] == 0 and (np.diff(start) > 0).all() and (valid > 0).all()
        assert (start[1:] <= start[:-1] + length).all() and start[-1] + length >= steps  # no gap, the end is reached
        assert len(start) == 1 or start[-2] + length < steps  # the last one is needed
        if training:
            assert (valid == min(length, steps)).all()  # all full, where the recording is long enough
        else:
            assert (np.diff(start) == max(1, round(length * (1 - overlap)))).all()


TENTHS = TimeGrid(10)


def recording(steps, segments, labels=None, grid=TENTHS):
    "A data set of one training recording, straight in memory."
    segments = np.array(segments, dtype=np.float64).reshape(-1, 2)
    labels = np.arange(len(segments)) if labels is None else np.array(labels)
    array = np.zeros((steps + 1, 2), dtype=np.float32)
    array[:-1] = np.random.default_rng(steps).normal(size=(steps, 2))
    one = Video("one", "train", grid.to_seconds(steps - 0.5), grid, steps, 0, segments, labels.astype(np.int64))
    return Dataset(Path("one"), tuple(map(str, labels)), (one,), 2, array)


def test_an_instance_belongs_where_three_quarters_of_it_lie():
    # Windows of 10 steps over 20 at 10 Hz are [0, 1) and [1, 2) seconds; 25% of the second instance lie beyond 1 s.
    one = recording(20, [(0.2, 0.6), (0.7, 1.1), (0.6, 1.2), (0.9, 1.9)])
    windows = training_windows(one, length=10, overlap=0)
    assert [target["labels"].tolist() for target in windows.targets] == [[0, 1], [3]] and windows.lost == 1
    assert np.allclose(windows.to_seconds(0, windows.targets[0]["segments"]), [(0.2, 0.6), (0.7, 1.0)], atol=1e-6)
    assert np.allclose(windows.targets[0]["segments"], [(0.4, 0.4), (0.85, 0.3)])
    assert np.allclose(windows.to_seconds(1, windows.targets[1]["segments"]), [(1.0, 1.9)], atol=1e-6)
    assert training_windows(one, length=10, overlap=0, keep=0.5).lost == 0
    with pytest.raises(DataError, match="keep is 0"):
        training_windows(one, keep=0)


def test_training_windows_shift_left_and_need_an_instance():
    one = recording(300, [(0.5, 2.0), (27.0, 29.5)])
    windows = training_windows(one, length=128)
    assert windows.start.tolist() == [0, 172] and windows.valid.tolist() == [128, 128]
    assert len(training_windows(recording(300, []), length=128)) == 0


def test_test_windows_keep_all_and_pad_the_last():
    windows = windows_for_testing(recording(300, [(0.5, 2.0)]), length=128, split="train")
    assert windows.start.tolist() == [0, 96, 192] and windows.valid.tolist() == [128, 128, 108]
    assert [len(target["labels"]) for target in windows.targets] == [1, 0, 0]
    batch = windows.batch([2])
    assert batch.mask[0].tolist() == [False] * 108 + [True] * 20 and not batch.features[0, 108:].any()


@pytest.mark.parametrize("make", [training_windows, lambda d, **more: windows_for_testing(d, split="train", **more)])
@pytest.mark.parametrize("steps", [1, 5, 127])
def test_a_recording_shorter_than_a_window_is_one_padded_window(make, steps):
    end = steps / 10
    windows = make(recording(steps, [(0.1 * end, 0.9 * end)]), length=128)
    assert len(windows) == 1 and windows.valid.tolist() == [steps]
    assert np.allclose(windows.targets[0]["segments"], [(0.5, 0.8)])  # normalised by what is valid
    assert np.allclose(windows.to_seconds(0, [(0.5, 1.0)]), [(0, end)])
    features, mask, _ = windows.batch([0])
    assert features.shape == (1, 128, 2) and int((~mask).sum()) == steps and not features[mask].any()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.integers(20, 400), length=st.integers(16, 128), fps=st.sampled_from([25, 29.97, 30]),
       grid=st.sampled_from([(4, 4), (4, 16), (8, 16), (1, 1)]), places=st.lists(
           st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=5), training=st.booleans())
def test_targets_lead_back_to_the_annotation(steps, length, fps, grid, places, training):
    grid = TimeGrid(fps, *grid)
    first, last = grid.to_seconds(-0.5), grid.to_seconds(steps - 0.5)
    segments = [(first + p * (last - first) * 0.9, first + (p * 0.9 + w * 0.1) * (last - first)) for p, w in places]
    one = recording(steps, segments, grid=grid)
    windows = (training_windows if training else windows_for_testing)(one, length, split="train")
    for i, target in enumerate(windows.targets):
        left, right = windows.to_seconds(i, [0.5, 1.0])
        back = windows.to_seconds(i, target["segments"])
        assert target["segments"].dtype == torch.float32 and back.dtype == np.float64
        for (start, end), label in zip(back, target["labels"].tolist()):
            true = np.clip(one.videos[0].segments[label], left, right)  # for one wholly inside, the annotation itself
            assert np.abs([start, end] - true).max() <= 1e-7 * (right - left) + 1e-9
            assert true[1] - true[0] >= 0.75 * np.diff(one.videos[0].segments[label]) - 1e-6
    seen = {label for target in windows.targets for label in target["labels"].tolist()}
    assert windows.lost == len(segments) - len(seen)


def test_a_batch_is_the_views_padded(dataset):
    windows = windows_for_testing(dataset, length=64, split=None)
    chosen = np.random.default_rng(0).permutation(len(windows))
    features, mask, targets = windows.batch(chosen)
    assert features.dtype == torch.float32 and mask.dtype == torch.bool and len(targets) == len(windows)
    for row, hidden, target, i in zip(features.numpy(), mask.numpy(), targets, chosen):
        assert np.array_equal(row[~hidden], windows.view(i)) and (~hidden).sum() == windows.valid[i]
        assert not row[hidden].any() and not np.diff(hidden.astype(int)).min(initial=0) < 0
        assert target is windows.targets[i]


def test_views_share_memory_and_batches_do_not(dataset):
    windows = training_windows(dataset, length=64)
    assert all(np.shares_memory(windows.view(i), dataset.array) for i in range(len(windows)))
    assert all(np.shares_memory(dataset.features(video.name), dataset.array) for video in dataset.videos)
    windows.batch([0]).features.fill_(9)
    assert not (dataset.array == 9).any() and not dataset.array[-1].any()


def test_mapped_data_gives_the_same_batches(folder, dataset):
    np.save(folder / "features" / "a.npy", dataset.features("a").astype(np.float16))
    held, mapped = load_dataset(folder), load_dataset(folder, in_memory=False)
    assert mapped.array is None and mapped.hash() == held.hash()
    for make in (training_windows, windows_for_testing):
        ours, theirs = make(held, length=48), make(mapped, length=48)
        assert np.array_equal(ours.start, theirs.start) and ours.lost == theirs.lost
        one, other = ours.batch(range(len(ours))), theirs.batch(range(len(theirs)))
        assert torch.equal(one.features, other.features) and torch.equal(one.mask, other.mask)


def test_windows_of_a_bare_recording(dataset):
    features = dataset.features("d")
    bare, windows = windows_of(features, 64, grid=TimeGrid(10)), windows_for_testing(dataset, 64)
    mine = np.flatnonzero(windows.video == 3)
    assert torch.equal(bare.batch(range(len(bare))).features, windows.batch(mine).features)
    assert torch.equal(windows_of(torch.from_numpy(features.copy()), 64).batch([1]).features, bare.batch([1]).features)
    assert np.allclose(bare.to_seconds(1, (0.5, 1.0)), windows.to_seconds(mine[1], (0.5, 1.0)))
    with pytest.raises(DataError, match="matrix"):
        windows_of(features[0])
    with pytest.raises(DataError, match="step 3"):
        windows_of(np.where(np.arange(250)[:, None] == 3, np.nan, features))


@pytest.mark.parametrize("length, overlap", [(0, 0.5), (128, 1.0), (128, -0.1)])
def test_impossible_windows_are_refused(dataset, length, overlap):
    with pytest.raises(DataError, match="give length"):
        training_windows(dataset, length, overlap)


def long_recording(hours):
    "A recording of so many hours with an action every seven seconds, and no features."
    grid, start = TimeGrid(6), np.arange(0, hours * 3600 - 7, 7.0)
    steps, labels = hours * 3600 * 6, np.zeros(len(start), dtype=np.int64)
    video = Video("one", "train", hours * 3600.0, grid, steps, 0, np.stack([start, start + 4], axis=1), labels)
    return Dataset(Path("none"), ("action",), (video,), 4, None)


def test_cutting_a_long_recording_grows_with_its_length(monkeypatch):
    compared = []

    def counting(segments, labels, start, valid, keep, real=windows._window_targets):
        compared.append(len(segments) * len(start))
        return real(segments, labels, start, valid, keep)

    monkeypatch.setattr(windows, "_window_targets", counting)
    work = []
    for hours in (2, 20):
        compared.clear()
        training_windows(long_recording(hours))
        work.append(sum(compared))
    assert 9 * work[0] < work[1] < 11 * work[0]
