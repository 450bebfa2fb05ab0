"The inner split looks at training recordings alone; settings follow from the data, or stay as they were given."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import refused

from selfdetr.data.dataset import Dataset, Video, load_dataset, load_fold
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import WindowConfig, training_windows
from selfdetr.settings import LEAST, STEPS, choose_settings, inner_split
from selfdetr.trainer import TrainConfig


def made(*recordings):
    "A data set of training recordings without a test one; each has steps, and instances in steps."
    videos, offset = [], 0
    for i, (steps, instances) in enumerate(recordings):
        segments = np.array(instances, dtype=float).reshape(-1, 2) / 10
        labels = np.zeros(len(segments), dtype=np.int64)
        videos.append(Video(f"v{i}", "train", steps / 10, TimeGrid(10), steps, offset, segments, labels))
        offset += steps
    return Dataset(Path("made"), ("act",), tuple(videos), 2, np.zeros((offset + 1, 2), np.float32))


def chosen(dataset, windows=WindowConfig(), train=TrainConfig(), given=()):
    return {choice.name: choice.value for choice in choose_settings(dataset, windows, train, given)}


def split_names(dataset):
    return [[video.name for video in dataset.split(split)] for split in ("train", "test")]


# ---- the inner split


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_inner_split_holds_no_test_recording(tiny_folder, in_memory):
    whole = load_dataset(tiny_folder, in_memory=in_memory)
    inner = inner_split(whole)
    trained, tested = split_names(whole)
    assert split_names(inner) == [sorted(trained)[:-1], sorted(trained)[-1:]]
    assert all(np.array_equal(inner.features(name), whole.features(name)) for name in trained)
    assert sorted(set(inner.ground_truth(None).video)) == sorted(trained)
    for name in tested:
        assert f"there is no video {name!r}" in refused(lambda name=name: inner.features(name))
    assert split_names(whole) == [trained, tested] and inner.scale is whole.scale


@pytest.mark.parametrize("count, held", [(2, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_a_fifth_is_held_out_the_last_by_name_in_any_order_of_the_videos(count, held):
    whole = made(*[(50, [(5, 25)])] * count)
    for order in (range(count), range(count)[::-1], np.random.default_rng(0).permutation(count)):
        whole.videos = tuple(whole.videos[i] for i in order)
        trained, tested = split_names(inner_split(whole))
        assert sorted(trained + tested) == sorted(f"v{i}" for i in range(count))
        assert len(tested) == held and min(tested) > max(trained)


def test_what_cannot_be_split_is_one_line(tiny):
    assert "needs two training videos or more; there is 1" in refused(lambda: inner_split(made((50, []))))
    tiny.video_scores = Path("scores.json")
    assert "remove video_scores from dataset.json" in refused(lambda: inner_split(tiny))


def test_the_inner_split_of_a_fold_leaves_what_the_fold_tests_on_out(folds_folder):
    inner = {fold: inner_split(load_fold(folds_folder, fold)) for fold in "123"}
    for fold, data in inner.items():
        trained, tested = split_names(load_fold(folds_folder, fold))
        assert sorted(sum(split_names(data), [])) == sorted(trained) and not set(tested) & set(data.by_name)
    assert len({data.hash() for data in inner.values()}) == 3


# ---- settings


def test_without_an_instance_nothing_is_chosen():
    message = refused(lambda: choose_settings(made((50, []), (60, []))))
    assert message.startswith("made: no training video has an instance")


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_a_window_has_128_steps_at_least(steps):
    "Also where recordings are shorter: their windows are padded."
    short = made((steps, [(0, min(steps, 6))]), (1, []))
    assert chosen(short)["windows.length"] == 128 and len(training_windows(short, 128)) == 1


def test_a_window_has_1024_steps_at_most():
    long = made((9000, [(100, 1200), (3000, 3040)]), (9000, [(0, 4000)]))
    assert chosen(long)["windows.length"] == 1024
    message = refused(lambda: choose_settings(made((9000, [(0, 4000)]))))
    assert "made: no training instance fits a window of 1024 steps; set a larger windows.length" in message
    given = chosen(made((9000, [(0, 4000)])), WindowConfig(length=4096), given=["windows.length"])
    assert set(given) == {"model.queries", "train.epochs"}


def test_many_instances_raise_the_number_of_queries():
    "The window in which most of them lie counts, and 40 are the least."
    crowded = made((256, [(2 * i, 2 * i + 2) for i in range(30)]), (256, [(100, 102)]))
    assert chosen(crowded)["windows.length"] == 128
    assert chosen(crowded)["model.queries"] == 60
    assert chosen(made((256, [(2 * i, 2 * i + 2) for i in range(20)])))["model.queries"] == 40


def test_epochs_count_the_windows_that_an_epoch_has():
    "Random windows are more than those of the grid that hold an instance."
    sparse = made((6400, [(10, 30)]), (6400, [(500, 520)]))
    windows, train = WindowConfig(length=64, overlap=0.5), TrainConfig(batch=4)
    fixed = chosen(sparse, windows, train, ["windows.length"])["train.epochs"]
    drawn = chosen(sparse, replace(windows, random=True), train, ["windows.length"])["train.epochs"]
    assert drawn == -(-STEPS // (2 * 199 // 4)) < fixed == STEPS


def test_what_is_given_stays_and_counts():
    dataset = made((2000, [(10, 30), (40, 60), (500, 520)]))
    every = choose_settings(dataset)
    for left_out in every:
        others = {choice.name for choice in every if choice is not left_out}
        assert set(chosen(dataset, given=[left_out.name, "train.lr"])) == others
    assert chosen(dataset, given=[choice.name for choice in every]) == {}
    crowded = made((256, [(2 * i, 2 * i + 2) for i in range(60)]))
    for length, queries in (32, 40), (64, 64), (128, 120):
        assert chosen(crowded, WindowConfig(length=length), given=["windows.length"])["model.queries"] == queries


def test_a_large_data_set_gets_epochs_after_the_warm_up():
    few, many = WindowConfig(length=16, keep=0.01), WindowConfig(length=8, overlap=0.875, keep=0.01)
    dataset, train, given = made((600, [(10, 590)]), (600, [(10, 590)])), TrainConfig(batch=1), ["windows.length"]
    assert chosen(dataset, few, train, given)["train.epochs"] > LEAST
    assert chosen(dataset, many, train, given)["train.epochs"] == LEAST
