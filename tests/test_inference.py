"Detections of data sets and recordings against their definition; suppression; what is kept."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SIZE, close, some_model

from selfdetr.data.dataset import load_dataset
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import WindowConfig, test_windows, window_starts
from selfdetr.inference import (
    DETECTION_COLUMNS, FeatureSource, InferenceConfig, cut_windows, detect, detect_dataset, detect_recordings, merge,
    top_scores)
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.segments import elementwise_iou, pairwise_iou

row = st.tuples(st.sampled_from("uv"), st.integers(0, 9), st.integers(0, 5), st.sampled_from("AB"), st.integers(0, 9))
SHORT = WindowConfig(length=32)


@st.composite
def some_detections(draw, most=25):
    rows = draw(st.lists(row, min_size=1, max_size=most))
    return pd.DataFrame([(v, float(s), float(s + w), c, p / 10) for v, s, w, c, p in rows], columns=DETECTION_COLUMNS)


@pytest.fixture(scope="module")
def model():
    return some_model()


@torch.no_grad()
def by_definition(model, dataset, config, cut):
    "Detections in the windows of `test_windows`, batch by batch, joined for all recordings before they are merged."
    windows, tables = test_windows(dataset, cut.length, cut.test_overlap), []
    place = list(zip(windows.video, windows.start, windows.start + windows.valid))
    for first in range(0, len(windows), config.batch):
        chosen = range(first, min(first + config.batch, len(windows)))
        batch = windows.batch(chosen)
        best = top_scores(model(batch.features, batch.mask, maps=False), config.top)
        for i, scores, labels, segments in zip(chosen, *best):
            video, grid = windows.video[i], dataset.videos[windows.video[i]].grid
            times = windows.to_seconds(i, segments)
            before = [end for v, start, end in place if v == video and start < windows.start[i]]
            after = [start for v, start, _ in place if v == video and start > windows.start[i]]
            limits = grid.to_seconds(np.array([max(before, default=-1e9), min(after, default=1e9)]) - 0.5)
            shared = (times[:, 0] < limits[0] - 1e-9) | (times[:, 1] > limits[1] + 1e-9)
            first, last = windows.start[i] - 0.5, windows.start[i] + windows.valid[i] - 0.5
            edge = 0.02 * cut.length  # what goes beyond it ends at a border inside the recording
            ends = grid.to_seconds(np.array([first + edge if before else -1e9, last - edge if after else 1e9]))
            scores[(times[:, 0] < ends[0]) | (times[:, 1] > ends[1])] *= config.cut
            times = times.clip(0, dataset.videos[video].duration)
            columns = dict(start=times[:, 0], end=times[:, 1], label=labels, score=scores, shared=shared)
            tables.append(pd.DataFrame({"video": video} | columns))
    raw = pd.concat(tables, ignore_index=True)
    found = merge(raw[(raw.score >= config.min_score) & (raw.end > raw.start)], config)
    names = dict(enumerate(video.name for video in dataset.videos)), dict(enumerate(dataset.classes))
    return found.assign(video=found.video.map(names[0]), label=found.label.map(names[1]))


LOADED = {"in memory": {}, "standardised": {"standardised": True}, "resized": {"resize": 48}}
LOADED |= {"mapped": {"in_memory": False}}


KINDS = ["soft", "hard", "overlap", "none"]
MORE = dict(cut=0.3, voting=0.6)


@pytest.mark.parametrize("loaded, kind, more", [
    *(("in memory", kind, more) for kind in KINDS for more in ({}, MORE)),
    *((loaded, "overlap", MORE) for loaded in LOADED if loaded != "in memory"),
], ids=str)  # fmt: skip
def test_a_data_set_gives_what_the_definition_gives(model, tiny_folder, one_thread, kind, loaded, more):
    dataset = load_dataset(tiny_folder, **LOADED[loaded])
    config = InferenceConfig(nms=kind, batch=5, most=20, **more)
    found = detect_dataset(model, dataset, config, SHORT)
    expected = by_definition(model, dataset, config, SHORT)
    assert list(found) == DETECTION_COLUMNS and len(found) == 40
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_nothing_found_is_an_empty_table(model, tiny):
    found = detect_dataset(model, tiny, InferenceConfig(min_score=1.0), SHORT)
    assert list(found) == DETECTION_COLUMNS and found.empty
    assert detect_dataset(model, tiny, InferenceConfig(min_score=1.0), SHORT, split=None).empty


def test_recordings_come_as_soon_as_the_next_one_is_seen(model, tiny, one_thread):
    "Each has its own detections and ends with its last step where no duration is known."
    opened, values = [], tiny.features(tiny.videos[0].name)

    def recordings():
        for number, steps in enumerate((5, 100, 20, 20)):
            opened.append(number)
            yield FeatureSource(str(number), values[:steps], TimeGrid(10))

    seen = []
    config = InferenceConfig(batch=1)
    for recording, found in detect_recordings(model, recordings(), config, SHORT):
        seen.append((recording.name, len(opened)))
        alone = detect(model, recording.features, recording.grid, config=config, windows=SHORT)
        assert found.equals(alone) and found.end.max() <= len(recording.features) / 10
    assert seen == [("0", 2), ("1", 3), ("2", 4), ("3", 4)]


@settings(max_examples=30)
@given(steps=st.integers(1, 90), length=st.integers(1, 40), overlap=st.floats(0, 0.99), size=st.integers(1, 50))
def test_windows_that_are_cut_on_the_way_are_those_of_the_whole(steps, length, overlap, size):
    values = np.arange(float(steps))[:, None]
    cut = list(cut_windows((values[i : i + size] for i in range(0, steps, size)), length, overlap))
    starts = window_starts(steps, length, overlap, shift_last=False)
    assert [start for start, _, _ in cut] == starts.tolist()
    assert all(np.array_equal(part, values[start : start + length]) for start, part, _ in cut)


def test_detection_in_many_recordings_holds_few_of_them(tiny, peak_bytes):
    model = SelfDETR(ModelConfig(channels=8, classes=3, **SIZE | {"queries": 60}))
    values, peaks = tiny.features(tiny.videos[0].name)[:30], []
    for count in (10, 80):
        recordings = (FeatureSource(str(i), values, TimeGrid(10)) for i in range(count))
        work = detect_recordings(model, recordings, InferenceConfig(batch=4), SHORT)
        most, found = peak_bytes(lambda work=work: sum(1 for _ in work), times=1)
        assert found == count
        peaks.append(most)
    assert peaks[1] - peaks[0] < 70 * 180 * 40 / 4  # raw detections of the others are 40 bytes each, 180 a window


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_are_kept_of_a_recording_as_asked_for(kind):
    "The reference keeps 200 of a video over all its classes, not of each class."
    start = np.arange(600.0)
    every = pd.DataFrame({"video": start % 2, "start": start, "end": start + 0.5, "label": start % 3})
    every = every.assign(score=np.linspace(0.9, 0.1, 600), shared=True)
    kept = merge(every, InferenceConfig(nms=kind))
    assert list(kept.columns) == DETECTION_COLUMNS
    assert kept.equals(every[DETECTION_COLUMNS].groupby("video").head(200).reset_index(drop=True))


@settings(max_examples=40)
@given(every=some_detections(), data=st.data())
def test_overlap_deletes_only_where_two_windows_look(every, data):
    "Against the definition: by falling score, delete what overlaps a kept one of its class, if both are shared."
    shared = data.draw(st.lists(st.booleans(), min_size=len(every), max_size=len(every)))
    kept: list[int] = []
    segments = every[["start", "end"]].to_numpy()
    for i in every.score.sort_values(ascending=False, kind="stable").index:
        alike = [k for k in kept if shared[k] and (every.video[k], every.label[k]) == (every.video[i], every.label[i])]
        if not shared[i] or not any(elementwise_iou(segments[i], segments[k]) > 0.4 for k in alike):
            kept.append(i)
    found = merge(every.assign(shared=shared), InferenceConfig(nms="overlap"))
    assert sorted(found.itertuples(index=False)) == sorted(every.loc[kept, DETECTION_COLUMNS].itertuples(index=False))
    assert found.score.is_monotonic_decreasing


# ---- segments that a window cuts, and voting


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_voting_do_not_depend_on_how_features_come(model, tiny, one_thread, kind):
    video, config = tiny.videos[0], InferenceConfig(nms=kind, **MORE)
    values = tiny.features(video.name)
    whole = detect(model, values, video.grid, config=config, windows=SHORT)
    for size in (1, 31, 32, 100):
        pieces = (values[i : i + size] for i in range(0, len(values), size))
        assert detect(model, pieces, video.grid, config=config, windows=SHORT).equals(whole)
    one, many = (detect_dataset(model, tiny, replace(config, batch=batch), SHORT) for batch in (1, 32))
    assert len(one) > 100 and close(one, many) and one.video.equals(many.video)


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_neither_lower_scores_nor_move_segments(model, tiny, one_thread, kind):
    "The detections are the merged raw ones, bit for bit."
    every = InferenceConfig(nms="none", most=10**6)
    raw, config = detect_dataset(model, tiny, every, SHORT), InferenceConfig(nms=kind)
    found = detect_dataset(model, tiny, config, SHORT)
    assert config == InferenceConfig(nms=kind, cut=1, voting=0)
    if kind != "overlap":  # which asks what two windows share
        pd.testing.assert_frame_equal(found, merge(raw, config), check_exact=True)
    pairs = pairwise_iou(found[["start", "end"]].to_numpy(), raw[["start", "end"]].to_numpy())
    same = found[["video", "label"]].to_numpy()[:, None] == raw[["video", "label"]].to_numpy()
    assert (np.where(same.all(2), pairs, 0).max(1) == 1).all()
    moved = detect_dataset(model, tiny, replace(config, voting=0.6), SHORT)
    lowered = detect_dataset(model, tiny, replace(every, cut=0.3), SHORT)
    assert not moved.start.equals(found.start) and moved.score.equals(found.score)
    assert 0 < lowered.score.sum() < raw.score.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_nothing_vote_without_a_division_by_it(model, tiny, kind):
    config = InferenceConfig(nms=kind, cut=0, voting=0.5, min_score=0, most=500)
    found = detect_dataset(model, tiny, config, SHORT)
    assert (found.score == 0).any() and np.isfinite(found[["start", "end", "score"]].to_numpy()).all()
    assert (found.end > found.start).all()


@settings(max_examples=60)
@given(every=some_detections(), kind=st.sampled_from(KINDS), voting=st.sampled_from([0.1, 0.4, 0.5, 1]),
       most=st.integers(1, 30), data=st.data())
def test_voting_moves_segments_among_those_that_vote_and_changes_nothing_else(every, kind, voting, most, data):
    shared = data.draw(st.lists(st.booleans(), min_size=len(every), max_size=len(every)))
    every, config = every.assign(shared=shared), InferenceConfig(nms=kind, min_score=0, most=most)
    plain, voted = merge(every, config), merge(every, replace(config, voting=voting))
    rest = ["video", "label", "score"]
    pd.testing.assert_frame_equal(voted[rest], plain[rest], check_exact=True)
    for before, after in zip(plain.itertuples(), voted.itertuples()):
        own = every[(every.video == before.video) & (every.label == before.label)]
        segments = own[["start", "end"]].to_numpy()
        iou = pairwise_iou(np.array([[before.start, before.end]]), segments)[0]
        weight = np.where(iou >= voting, iou * own.score, 0.0)  # 0 in sum: one without a length, or scores of 0
        expected = weight @ segments / weight.sum() if weight.sum() > 0 else (before.start, before.end)
        assert (after.start, after.end) == pytest.approx(tuple(expected), abs=1e-9)
