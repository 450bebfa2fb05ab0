"""The contracts of selfdetr.data: what is refused and how, what is mended and counted, time, and windows."""

import copy
import hashlib
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfdetr import data
from selfdetr.data import DataError, TimeGrid, load_dataset, read_annotations, training_windows, windows_of

CHANNELS = 6
COMPOSED, DECOMPOSED = "\u00fcbung_1", "u\u0308bung_1"  # look the same
DURATIONS = {"a": 30.0, "b": 20.0, "c": 5.0, "d": 25.0, "e": 0.1}
INSTANCES = {
    "a": [("run", 1.0, 3.0), ("jump", 2.5, 6.5), ("run", 28.0, 29.95)],
    "b": [("jump", 0.0, 19.0), ("run", 4.0, 4.5)],
    "c": [("run", 1.0, 4.0)],
    "d": [("run", 3.0, 6.0), ("jump", 20.0, 25.0)],
    "e": [],
}


def annotation(label, start, end):
    return {"label": label, "segment": [start, end]}


def database():
    return {name: {"subset": "test" if name in "de" else "training", "duration": duration, "fps": 10,
                   "annotations": [annotation(*row) for row in INSTANCES[name]]}
            for name, duration in DURATIONS.items()}


def write(folder, entries=None, **settings):
    (folder / "features").mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps({"database": entries or database()}))
    (folder / "dataset.json").write_text(json.dumps({"stride": 1, "snippet": 1, **settings}))
    random = np.random.default_rng(0)
    for name, duration in DURATIONS.items():
        features = random.normal(size=(round(duration * 10), CHANNELS)).astype(np.float32)
        np.save(folder / "features" / f"{name}.npy", features)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "sports")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_dataset(write(tmp_path_factory.mktemp("data") / "sports"))


# Bad input: one DataError that names the file, the video and the mend.

def edit(change):
    def spoil(folder):
        entries = database()
        change(entries)
        (folder / "annotations.json").write_text(json.dumps({"database": entries}))
    return spoil


def save(array, name="b"):
    return lambda folder: np.save(folder / "features" / f"{name}.npy", array, allow_pickle=True)


def cut(name, size):
    def spoil(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])
    return spoil


def remove(folder, *names):
    for name in names:
        (folder / "features" / f"{name}.npy").unlink()


def without(folder, name):
    (folder / name).rename(folder / "elsewhere")


def list_twice(folder):
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"c": {', '"b": {'))


def with_nan(value, step):
    features = np.zeros((200, CHANNELS), dtype=np.float32)
    features[step, 2] = value
    return features


SPOILED = {
    "no annotation file": (lambda f: without(f, "annotations.json"), ["annotations.json", "check the path"]),
    "no feature folder": (lambda f: without(f, "features"), ["features", "no such folder", "put"]),
    "JSON cut short": (cut("annotations.json", 300), ["annotations.json", "cut short", "copy it again"]),
    "JSON of another kind": (lambda f: (f / "annotations.json").write_text("[1]"),
                             ["annotations.json", "not an object"]),
    "JSON without videos": (lambda f: (f / "annotations.json").write_text("{}"), ["annotations.json", "no videos"]),
    "JSON in another encoding": (lambda f: (f / "annotations.json").write_bytes(b"\xff\xfe{}"),
                                 ["annotations.json", "JSON"]),
    "video listed twice": (list_twice, ["annotations.json", "video 'b'", "listed twice", "keep one"]),
    "end before start": (edit(lambda d: d["b"]["annotations"].append(annotation("run", 5, 4.5))),
                         ["annotations.json", "video 'b'", "annotation 2", "4.5 s", "5 s", "correct or remove"]),
    "time in quotes": (edit(lambda d: d["c"]["annotations"].append(annotation("run", 1, "2.5"))),
                       ["video 'c'", "annotation 1", "end is '2.5'", "without quotes"]),
    "class for label": (edit(lambda d: d["c"]["annotations"].append({"class": "run", "segment": [1, 2]})),
                        ["video 'c'", "annotation 1", 'no label, but "class"', '"label"']),
    "label_id for label": (edit(lambda d: d["c"]["annotations"].append({"label_id": 3, "segment": [1, 2]})),
                           ["video 'c'", 'no label, but "label_id"', "name of that class"]),
    "misspelt label": (edit(lambda d: d["c"]["annotations"].append({"lable": "run", "segment": [1, 2]})),
                       ["video 'c'", 'no label, but "lable"', "rename"]),
    "timestamps for segment": (edit(lambda d: d["c"]["annotations"].append({"label": "run", "timestamps": [1, 2]})),
                               ["video 'c'", 'no segment, but "timestamps"', '"segment"']),
    "frames for segment": (edit(lambda d: d["c"]["annotations"].append({"label": "run", "segment(frames)": [1, 2]})),
                           ["video 'c'", 'no segment, but "segment(frames)"', "divide it by the frame rate"]),
    "segment of three": (edit(lambda d: d["c"]["annotations"].append({"label": "run", "segment": [1, 2, 3]})),
                         ["video 'c'", "segment is [1, 2, 3]", "[start, end]"]),
    "duration_second": (edit(lambda d: d["c"].update(duration_second=d["c"].pop("duration"), duration_frame=50)),
                        ["video 'c'", 'no duration, but "duration_second"', 'rename that to "duration"']),
    "duration_frame": (edit(lambda d: d["c"].update(duration_frame=50 * d["c"].pop("duration"))),
                       ["video 'c'", 'no duration, but "duration_frame"', "divide it by the frame rate"]),
    "duration in quotes": (edit(lambda d: d["c"].update(duration="12.5")),
                           ["video 'c'", "duration is '12.5'", "without quotes"]),
    "split for subset": (edit(lambda d: d["c"].update(split=d["c"].pop("subset"))),
                         ["video 'c'", 'no subset, but "split"', "rename"]),
    "timestamps for annotations": (edit(lambda d: d["c"].update(timestamps=[[1, 2]], x=d["c"].pop("annotations"))),
                                   ["video 'c'", 'no annotations, but "timestamps"', '"segment": [start, end]']),
    "annotation for annotations": (edit(lambda d: d["c"].update(annotation=d["c"].pop("annotations"))),
                                   ["video 'c'", 'no annotations, but "annotation"', "rename"]),
    "test subset without annotations": (edit(lambda d: d["d"].update(annotations=[])),
                                        ["subset 'test' has 2 videos and no annotations", "name another for test"]),
    "training subset without annotations": (
        edit(lambda d: [d[name].update(annotations=[]) for name in "abc"]),
        ["subset 'training' has 3 videos and no annotations", "name another for train"]),
    "negative start": (edit(lambda d: d["c"]["annotations"].insert(0, annotation("run", -0.5, 2))),
                       ["video 'c'", "annotation 0", "-0.5 s", "correct or remove"]),
    "time that is no number": (edit(lambda d: d["c"]["annotations"].append(annotation("run", "1", 2))),
                               ["video 'c'", "annotation 1", "start is '1'", "write a finite number"]),
    "time that is NaN": (edit(lambda d: d["c"]["annotations"].append(annotation("run", 1, math.nan))),
                         ["video 'c'", "annotation 1", "end is nan"]),
    "no segment": (edit(lambda d: d["c"]["annotations"].append({"label": "run"})),
                   ["video 'c'", "annotation 1", "write"]),
    "no label": (edit(lambda d: d["c"]["annotations"].append({"segment": [1, 2]})),
                 ["video 'c'", "annotation 1", "label"]),
    "no duration": (edit(lambda d: d["c"].pop("duration")), ["annotations.json", "video 'c'", "duration"]),
    "no subset": (edit(lambda d: d["c"].pop("subset")), ["annotations.json", "video 'c'", "subset"]),
    "zero duration": (edit(lambda d: d["c"].update(duration=0)), ["video 'c'", "duration is 0"]),
    "zero fps": (edit(lambda d: d["c"].update(fps=0)), ["video 'c'", "fps is 0", "positive"]),
    "fps nowhere": (edit(lambda d: d["c"].pop("fps")), ["video 'c'", "no fps", "dataset.json"]),
    "stride nowhere": (lambda f: (f / "dataset.json").unlink(), ["video 'a'", "no stride", "dataset.json"]),
    "subsets unclear": (edit(lambda d: d["c"].update(subset="val")),
                        ["annotations.json", "found: test, training, val", "name it"]),
    "subsets unknown": (edit(lambda d: [v.update(subset="fold1") for v in d.values()]), ["found: fold1", "name it"]),
    "no video to test on": (edit(lambda d: [v.update(subset="training") for v in d.values()]),
                            ["for test", "found: training"]),
    "test videos without features": (lambda f: remove(f, "d", "e"),
                                     ["features", "no test video", "<video>.npy", "a.npy"]),
    "train videos without features": (lambda f: remove(f, "a", "b", "c"),
                                      ["features", "no train video", "<video>.npy"]),
    "npy cut short": (cut("features/b.npy", 2000), ["b.npy", "video 'b'", "not a complete array", "again"]),
    "npy without header": (cut("features/b.npy", 0), ["b.npy", "video 'b'", "not a complete array", "again"]),
    "not an npy": (lambda f: (f / "features" / "b.npy").write_text("hello"), ["b.npy", "video 'b'", "again"]),
    "pickled array": (save(np.array([{}], dtype=object)), ["b.npy", "video 'b'", "pickled", "np.save"]),
    "other channel count": (save(np.zeros((200, 5), np.float32)),
                            ["b.npy", "video 'b'", "has 5 channels", "have 6", "again"]),
    "first video is the odd one": (save(np.zeros((300, 5), np.float32), "a"),
                                   ["a.npy", "video 'a'", "has 5 channels", "have 6"]),
    "one dimension": (save(np.zeros(200, np.float32)), ["b.npy", "video 'b'", "(200,)", "(steps, channels)"]),
    "three dimensions": (save(np.zeros((1, 200, 6), np.float32)), ["b.npy", "video 'b'", "(1, 200, 6)"]),
    "no steps": (save(np.zeros((0, 6), np.float32)), ["b.npy", "video 'b'", "again"]),
    "NaN": (save(with_nan(np.nan, 17)), ["b.npy", "video 'b'", "step 17", "NaN", "again"]),
    "infinite": (save(with_nan(-np.inf, 199)), ["b.npy", "video 'b'", "step 199", "infinite"]),
    "text features": (save(np.full((200, 6), "x")), ["b.npy", "video 'b'", "float32"]),
    "unknown setting": (lambda f: write(f, strid=4), ["dataset.json", "unknown key 'strid'", "'stride'?"]),
    "setting of another kind": (lambda f: write(f, fps="10"), ["dataset.json", "fps is '10'", "without quotes"]),
    "unknown subset key": (lambda f: write(f, subsets={"dev": []}), ["dataset.json", "'dev'", "train and test"]),
    "unknown subset": (lambda f: write(f, subsets={"train": ["dev"]}), ["'dev'", "found: test, training"]),
    "unknown label": (lambda f: write(f, classes=["runn", "jump"]),
                      ["annotations.json", "video 'a'", "'run'", "'runn'?"]),
    "class twice": (lambda f: write(f, classes=["run", "jump", "run"]), ["annotations.json", "'run'", "twice"]),
    "class twice in two forms": (lambda f: write(f, classes=["run", "jump", COMPOSED, DECOMPOSED]),
                                 ["annotations.json", "twice", "Unicode"]),
    "features are a file": (lambda f: write(f, features="annotations.json"),
                            ["annotations.json", "is a file", "give the folder"]),
}


@pytest.mark.parametrize("spoil, words", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_input_is_refused_with_its_place_and_mend(folder, spoil, words, in_memory):
    spoil(folder)
    with pytest.raises(DataError) as caught:
        load_dataset(folder, in_memory=in_memory)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("arguments, words", [
    (dict(classes=["jump"]), ["video 'a'", "unknown label 'run'", "jump"]),
    (dict(train="dev"), ["subset 'dev'", "found: test, training"]),
    (dict(train=[]), ["train", "unclear"]),
    (dict(train="test"), ["both train and test"]),
    (dict(test="tst"), ["subset 'tst'", "did you mean 'test'?"]),
    (dict(feature_format="h5"), ["feature format 'h5'", "npy, npz, pt"]),
    (dict(feature_format="npzz"), ["feature format 'npzz'", "did you mean 'npz'?"]),
    (dict(release="thumos"), ["release 'thumos'", "did you mean 'thumos14'?"]),
    (dict(grid=TimeGrid(10), resize=50), ["video 'a'", "grid", "resized to 50 steps", "one of the two"]),
    (dict(feature_format="npz"), ["no train video", "<video>.npz", "a.npy"]),
])
def test_bad_arguments_are_refused(folder, arguments, words):
    with pytest.raises(DataError) as caught:
        load_dataset(folder, **arguments)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_missing_folder_and_wrong_names(dataset, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no split 'val'"):
        dataset.split("val")
    with pytest.raises(DataError, match="no video 'z'"):
        dataset.features("z")


def test_stated_channel_count_is_held_to(folder):
    content = {"database": database(), "feature": {"dim": 7}}
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="'a': has 6 channels, the annotation file says 7"):
        load_dataset(folder)


def test_a_pickled_file_is_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    trap = np.array([Trap()], dtype=object)
    torch.save(Trap(), folder / "features" / "b.pt")
    np.savez(folder / "features" / "b.npz", trap)
    np.save(folder / "features" / "b.npy", trap, allow_pickle=True)
    (folder / "features" / "c.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("b.pt", "b.npz", "b.npy", "c.npy"):
        with pytest.raises(DataError, match="pickled"):
            data.read_features(folder / "features" / name)
    assert not (tmp_path / "sprung").exists()


# What real releases contain: mended and counted.

def test_quirks_are_handled_and_counted(folder):
    entries = database()
    entries["a"]["annotations"] += [annotation("run", 29, 31), annotation("jump", 30, 32), annotation("jump", 31, 33),
                                    annotation("run", 1, 3), annotation("Ambiguous", 2, 4), annotation("run", 0, 0),
                                    annotation("run", 5, 5)]
    entries["f"] = {"subset": "Training", "duration": 9, "fps": 10, "annotations": [annotation("run", 1, 2)]}
    entries["g"] = {"subset": "spare", "duration": 9, "annotations": [annotation("fly", 1, 2)]}
    (folder / "annotations.json").write_text(json.dumps({"database": entries}))
    np.save(folder / "features" / "b.npy", np.zeros((90, CHANNELS), np.float16))
    loaded = load_dataset(folder)
    assert {kind: len(cases) for kind, cases in loaded.report.items()} == {
        "clipped": 1, "beyond": 2, "duplicate": 1, "ignored": 1, "no length": 2,
        "no features": 1, "unused": 1, "one step": 1, "length": 1}
    assert set(loaded.report) == set(data.QUIRKS) - {"short", "fps", "other form"}
    assert load_dataset(folder, min_seconds=1.0).report["short"] == ["b: run 4-4.5 s"]
    assert loaded.classes == ("jump", "run")
    assert loaded.videos[0].segments.tolist() == [[1, 3], [2.5, 6.5], [28, 29.95], [29, 30]]
    assert "\n" not in loaded.summary() and "beyond their video, dropped: 2" in loaded.summary()


def test_without_quirks_nothing_is_reported(folder):
    write(folder)
    np.save(folder / "features" / "e.npy", np.zeros((2, CHANNELS), np.float32))
    entries = database()
    entries["e"]["duration"] = 0.2
    (folder / "annotations.json").write_text(json.dumps({"database": entries}))
    assert load_dataset(folder).summary().endswith("Handled: nothing")


def test_ground_truth_is_the_cleaned_annotations(dataset):
    table = dataset.ground_truth("train")
    expected = [[name, start, end, label] for name in "abc" for label, start, end in INSTANCES[name]]
    assert table.values.tolist() == expected
    assert len(dataset.ground_truth()) == 2 and len(dataset.ground_truth(None)) == 8
    assert dataset.ground_truth().dtypes.astype(str).tolist() == ["object", "float64", "float64", "object"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_labels_are_read_as_utf8_with_or_without_a_mark(folder, mark):
    entries = json.dumps({"database": database()}, ensure_ascii=False).replace("jump", "saut périlleux")
    (folder / "annotations.json").write_text(mark + entries, encoding="utf-8")
    assert load_dataset(folder).classes == ("run", "saut périlleux")


# Where settings come from.

@pytest.mark.filterwarnings("ignore:.*fps is")
def test_fps_comes_from_the_most_deliberate_source(folder):
    feature = {"fps": 50, "stride": 3, "snippet": 5}
    entries = database()
    del entries["b"]["fps"]
    (folder / "annotations.json").write_text(json.dumps({"database": entries, "feature": feature}))
    (folder / "dataset.json").unlink()
    assert [video.grid for video in load_dataset(folder).videos[:2]] == [TimeGrid(10, 3, 5), TimeGrid(50, 3, 5)]
    (folder / "dataset.json").write_text(json.dumps({"fps": 25, "stride": 8}))
    assert {video.grid for video in load_dataset(folder).videos} == {TimeGrid(25, 8, 5)}
    assert {video.grid for video in load_dataset(folder, grid=TimeGrid(30, 4, 16)).videos} == {TimeGrid(30, 4, 16)}


def test_arguments_come_before_dataset_json(folder):
    entries = database()
    write(folder, entries, subsets={"train": "test", "test": ["TRAINING"]}, classes=["run", "jump", "swim"])
    loaded = load_dataset(folder)
    assert [video.split for video in loaded.videos] == ["test"] * 3 + ["train"] * 2
    assert loaded.classes == ("run", "jump", "swim") and loaded.videos[0].labels.tolist() == [0, 1, 0]
    other = load_dataset(folder, train="Training", test="test", classes=["jump"], ignore_labels=["run"])
    assert [video.split for video in other.videos] == ["train"] * 3 + ["test"] * 2
    assert other.classes == ("jump",) and len(other.report["ignored"]) == 5


@pytest.mark.filterwarnings("ignore:.*every window will unpack")
@pytest.mark.parametrize("feature_format", ["npy", "npz", "pt"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_formats_and_orders_give_the_same_data(folder, dataset, feature_format, in_memory):
    for path in list((folder / "features").iterdir()):
        turned = np.load(path).T.copy()
        path.unlink()
        if feature_format == "npy":
            np.save(path, turned)
        elif feature_format == "npz":
            np.savez(path.with_suffix(".npz"), turned)
        else:
            torch.save(torch.from_numpy(turned), path.with_suffix(".pt"))
    loaded = load_dataset(folder, feature_format=feature_format, channels_first=True, in_memory=in_memory)
    assert loaded.hash() == dataset.hash()
    assert np.array_equal(loaded.features("d"), dataset.features("d"))


def test_the_hash_follows_all_that_matters(folder, dataset):
    hashes = {dataset.hash()}
    assert load_dataset(folder).hash() in hashes
    changes = [lambda d: d["a"]["annotations"][0]["segment"].__setitem__(0, 1.25),
               lambda d: d["a"]["annotations"][0].update(label="jump"),
               lambda d: d["e"].update(subset="training"), lambda d: d["d"].update(fps=12)]
    for change in changes:
        edit(change)(folder)
        hashes.add(load_dataset(folder).hash())
    edit(lambda d: None)(folder)
    save(np.load(folder / "features" / "b.npy") + np.float32(1e-3))(folder)
    hashes.add(load_dataset(folder).hash())
    assert len(hashes) == 2 + len(changes)


def test_the_hash_of_cleaned_instances_is_what_results_carry(folder):
    "Written out once more; committed results are looked up by it."
    for options in ({}, dict(ignore_labels=["run"]), dict(ignore_labels=["Ambiguous", "fly"])):
        loaded = load_dataset(folder, **options)
        digest = hashlib.sha256(repr(loaded.classes).encode())
        for video in loaded.videos:
            digest.update(repr((video.name, video.split, float(video.duration), video.steps)).encode())
            digest.update(np.array([10.0, 1.0, 1.0], "<f8").tobytes() + video.segments.astype("<f8").tobytes())
            digest.update(video.labels.astype("<i8").tobytes() + loaded.features(video.name).astype("<f4").tobytes())
        assert loaded.hash() == digest.hexdigest()


RAW = {"a protocol": dict(protocol="thumos14-212"), "video scores": dict(video_scores="scores.json")}
READ = {  # changes of the test videos that leave the cleaned instances as they are
    "duplicate": lambda d: d["d"]["annotations"].append(annotation("run", 3, 6)),
    "beyond": lambda d: d["d"]["annotations"].append(annotation("run", 26, 27)),
    "end beyond": lambda d: d["d"]["annotations"][1]["segment"].__setitem__(1, 26.0),
    "no length": lambda d: d["d"]["annotations"].append(annotation("run", 0, 0)),
    "ignored": lambda d: d["d"]["annotations"].append(annotation("Ambiguous", 8, 9))}
BASE = [annotation("run", 3.0, 6.0), annotation("jump", 20.0, 25.5)]  # the second is clipped at 25


@pytest.mark.parametrize("how", RAW.values(), ids=RAW)
def test_the_hash_has_what_judging_reads_of_the_file(folder, how):
    def hashed(change=lambda d: None, **more):
        entries = database()
        entries["d"]["annotations"] = copy.deepcopy(BASE)
        change(entries)
        (folder / "annotations.json").write_text(json.dumps({"database": entries}))
        return load_dataset(folder, **more).hash()

    (folder / "scores.json").write_text("{}")
    cleaned = {hashed(change) for change in READ.values()}
    assert cleaned == {hashed()}  # by the cleaned instances these folders are one
    hashes = [hashed(change, **how) for change in READ.values()]
    assert len({*hashes, hashed(**how)}) == len(READ) + 1
    assert hashed(**how, ignore_labels=["Ambiguous", "fly"]) != hashed(**how)
    assert hashed(**how, ignore_labels="Ambiguous") == hashed(**how)
    turned = hashed(lambda d: d["d"]["annotations"].reverse(), **how)
    assert turned != hashed(**how)  # which instance comes first decides ties


@pytest.mark.parametrize("how", [{}, *RAW.values()], ids=["cleaned", *RAW])
def test_the_hash_does_not_have_the_layout_of_the_file(folder, how):
    (folder / "scores.json").write_text("{}")
    before = load_dataset(folder, **how).hash()
    content = {"version": "2", "database": {name: dict(reversed(entry.items())) for name, entry in database().items()}}
    for entry in content["database"].values():
        entry["url"], entry["fps"], entry["duration"] = "x", 10.0, float(entry["duration"])
        entry["annotations"] = [{"id": 3, "segment": [int(t) if t == int(t) else t for t in item["segment"]],
                                 "label": item["label"]} for item in entry["annotations"]]
    (folder / "annotations.json").write_text(json.dumps(content, indent=3))
    assert load_dataset(folder, **how).hash() == before


def test_training_videos_are_no_part_of_how_video_scores_are_judged(folder):
    (folder / "scores.json").write_text("{}")
    before = load_dataset(folder, video_scores="scores.json").hash()
    edit(lambda d: d["a"]["annotations"].append(annotation("run", 1.0, 3.0)))(folder)
    assert load_dataset(folder, video_scores="scores.json").hash() == before


@pytest.mark.parametrize("ignore", ["run", ["run"], ("run",)])
def test_one_label_is_not_a_list_of_letters(folder, ignore):
    loaded = load_dataset(folder, ignore_labels=ignore)
    assert loaded.classes == ("jump",) and loaded.ignore_labels == ("run",)
    assert load_dataset(folder).ignore_labels == ("Ambiguous",)
    assert load_dataset(folder, classes="jump", ignore_labels=ignore).classes == ("jump",)


# Two frame rates for one video.

RATES = {  # fps of dataset.json, what the videos state, stride -> words of the warning
    "the stated one fits": (12.5, 10, 1, ["fps is 12.5 in use, but 10", "5 of 5 videos", "0.80 of the durations",
                                          "10 fits better", "correct"]),
    "the one in use fits": (10, 12.5, 1, ["fps is 10 in use, but 12.5", "10 fits better", "seems right"]),
    "neither fits": (10, 12.5, 4, ["fps is 10 in use, but 12.5", "neither fits"]),
    "just over": (10, 10.11, 1, ["fps is 10 in use, but 10.11"])}


@pytest.mark.parametrize("in_use, stated, stride, words", RATES.values(), ids=RATES)
def test_frame_rates_that_differ_are_told_once(folder, in_use, stated, stride, words):
    write(folder, fps=in_use, stride=stride)
    edit(lambda d: [entry.update(fps=stated) for entry in d.values()])(folder)
    with pytest.warns(UserWarning) as caught:
        loaded = load_dataset(folder)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert [word for word in ["sports", *words] if word not in message] == [], message
    assert loaded.report["fps"][0] == f"a: {in_use:g} in use, {stated:g} stated" and len(loaded.report["fps"]) == 5
    assert {video.grid.fps for video in loaded.videos} == {in_use}  # the precedence is as it was
    assert "videos that state another frame rate than the one in use: 5" in loaded.summary()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stated, more", [(10.09, {}), (9.91, {}), (0, {}), (24, dict(resize=32))])
def test_frame_rates_that_agree_or_are_not_used_are_not_told(folder, stated, more):
    write(folder, fps=10)
    edit(lambda d: [entry.update(fps=stated) for entry in d.values()])(folder)
    assert "fps" not in load_dataset(folder, **more).report


def test_a_grid_of_the_call_and_a_feature_section_are_compared_as_well(folder):
    with pytest.warns(UserWarning, match="fps is 25 in use, but 10.*10 fits better"):
        load_dataset(folder, grid=TimeGrid(25))
    content = {"database": database(), "feature": {"fps": 5}}
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="fps is 10 in use, but 5.*10 fits better"):
        load_dataset(folder)


def test_rates_between_which_the_length_does_not_decide():
    nothing = np.zeros((0, 2)), np.zeros(0, np.int64)
    short = [data.AnnotatedVideo(name, "train", 5.0, 10.15, *nothing) for name in "abc"]
    grids, steps = dict.fromkeys("abc", TimeGrid(10)), dict.fromkeys("abc", 50)
    stated = data.stated_rates(short, grids, {})
    assert stated == dict.fromkeys("abc", 10.15)
    assert "both fit, so find out" in data.compare_rates(short, grids, steps, stated)


# One name in two Unicode forms.

@pytest.mark.parametrize("written, there", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("place", ["", "{}/"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_in_another_form_is_found_and_reported(folder, dataset, written, there, place, in_memory):
    edit(lambda d: d.update({place.format(written) + written: d.pop("b")}))(folder)
    path = folder / "features" / place.format(there) / f"{there}.npy"
    path.parent.mkdir(exist_ok=True)
    (folder / "features" / "b.npy").rename(path)
    loaded = load_dataset(folder, in_memory=in_memory)
    name = place.format(written) + written
    assert np.array_equal(loaded.features(name), dataset.features("b")) and "no features" not in loaded.report
    assert np.array_equal(loaded.features(place.format(there) + there), dataset.features("b"))
    (case,) = loaded.report["other form"]
    assert ascii(name) in case and ascii(f"{there}.npy") in case
    assert "names in another Unicode form, matched: 1" in loaded.summary()


def test_the_exact_name_goes_before_another_form(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b")}))(folder)
    save(np.ones((200, CHANNELS), np.float32), COMPOSED)(folder)
    save(np.zeros((200, CHANNELS), np.float32), DECOMPOSED)(folder)
    loaded = load_dataset(folder)
    assert loaded.features(COMPOSED).all() and "other form" not in loaded.report


def test_one_file_for_two_videos_is_refused(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b"), DECOMPOSED: d.pop("c")}))(folder)
    save(np.ones((200, CHANNELS), np.float32), COMPOSED)(folder)
    with pytest.raises(DataError) as caught:
        load_dataset(folder)
    assert ascii(COMPOSED) in str(caught.value) and ascii(DECOMPOSED) in str(caught.value)
    save(np.ones((50, CHANNELS), np.float32), DECOMPOSED)(folder)
    assert len(load_dataset(folder).videos) == 5


@pytest.mark.parametrize("settings, kept", [
    ({}, COMPOSED), (dict(classes=[DECOMPOSED, "jump", "run"]), DECOMPOSED), (dict(ignore_labels=[DECOMPOSED]), None)])
def test_a_label_in_two_forms_is_one_class(folder, settings, kept):
    odd = [annotation(COMPOSED, 8, 9), annotation(DECOMPOSED, 8, 9), annotation(DECOMPOSED, 10, 11)]
    edit(lambda d: d["a"]["annotations"].extend(odd))(folder)
    loaded = load_dataset(folder, **settings)
    assert set(loaded.classes) == {"jump", "run", kept} - {None}
    mine = loaded.ground_truth("train")
    assert len(mine[mine.label == kept]) == (2 if kept else 0)
    assert len(loaded.report["other form"]) == 1 and len(loaded.report.get("duplicate", [])) == (1 if kept else 0)


def test_a_subset_in_another_form_is_that_subset(folder):
    edit(lambda d: [entry.update(subset=COMPOSED) for entry in d.values() if entry["subset"] == "test"])(folder)
    assert len(load_dataset(folder, train="training", test=DECOMPOSED).split("test")) == 2


def test_a_place_in_another_form_is_found(folder, dataset):
    (folder / "features").rename(folder / DECOMPOSED)
    (folder / "annotations.json").rename(folder / f"{DECOMPOSED}.json")
    loaded = load_dataset(folder, features=COMPOSED, annotations=f"{COMPOSED}.json")
    assert loaded.hash() == dataset.hash()


# Files of several arrays: the line of Python in the message is the way out.

def saved_by(message, folder, monkeypatch):
    "What the line of Python in a message saves."
    monkeypatch.chdir(folder)
    exec(re.search(r"np\.save\(.*\)$", message)[0], {"np": np, "torch": torch})
    return data.read_features(folder / "b.npy")


RGB, FLOW = np.ones((7, 3), np.float32), np.zeros((7, 2), np.float32)
SEVERAL = {
    "npz, two streams": ("npz", dict(flow=FLOW, rgb=RGB), ["'flow', 'rgb'"], np.hstack([RGB, FLOW])),
    "npz": ("npz", dict(frames=RGB, times=FLOW), ["'frames', 'times'", "features"], RGB),
    "a dict": ("pt", {"fc7": torch.tensor(RGB), "n": 3}, ["a dict", "'fc7'"], RGB),
    "a dict of two streams": ("pt", {"flow": torch.tensor(FLOW), "rgb": torch.tensor(RGB)},
                              ["'flow', 'rgb'"], np.hstack([RGB, FLOW])),
    "a list": ("pt", [torch.tensor(RGB).half(), torch.tensor(FLOW)], ["a list", "0, 1"], RGB)}


@pytest.mark.parametrize("kind, content, words, wanted", SEVERAL.values(), ids=SEVERAL)
def test_a_file_of_several_arrays_says_how_to_save_one(folder, monkeypatch, kind, content, words, wanted):
    path = folder / "features" / f"b.{kind}"
    (folder / "features" / "b.npy").unlink()
    np.savez(path, **content) if kind == "npz" else torch.save(content, path)
    with pytest.raises(DataError) as caught:
        data.read_features(path)
    message = str(caught.value)
    assert [word for word in ["video 'b'", *words] if word not in message] == [], message
    assert "\n" not in message and "extract" not in message
    assert np.array_equal(saved_by(message, path.parent, monkeypatch), wanted)


@pytest.mark.parametrize("content, words", [
    ({"a": {"b": 1}}, ["a dict", "no array in it"]), ([], ["a list", "no array in it"]), (3.5, ["holds 3.5"])])
def test_a_pt_file_without_tensors(tmp_path, content, words):
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(DataError) as caught:
        data.read_features(tmp_path / "b.pt")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_file_for_a_folder_and_a_folder_for_a_file(folder):
    with pytest.raises(DataError, match="annotations.json: is a file; give the folder that holds it, '.*sports'"):
        load_dataset(folder / "annotations.json")
    with pytest.raises(DataError, match="a.npy: is a file; give the folder that holds one file of features a video"):
        load_dataset(folder, features="features/a.npy")
    with pytest.raises(DataError, match="features: is a folder; name the file in it"):
        data.read_json(folder / "features")


# Time.

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


# Windows.

@given(steps=st.integers(1, 700), length=st.integers(1, 150), overlap=st.sampled_from([0, 0.25, 0.5, 0.75, 0.9]))
def test_windows_cover_every_step_with_no_window_too_many(steps, length, overlap):
    for training in (True, False):
        start = data.window_starts(steps, length, overlap, shift_last=training)
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
    one = data.Video("one", "train", grid.to_seconds(steps - 0.5), grid, steps, 0, segments, labels.astype(np.int64))
    return data.Dataset(data.Path("one"), tuple(map(str, labels)), (one,), 2, array)


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
    windows = data.test_windows(recording(300, [(0.5, 2.0)]), length=128, split="train")
    assert windows.start.tolist() == [0, 96, 192] and windows.valid.tolist() == [128, 128, 108]
    assert [len(target["labels"]) for target in windows.targets] == [1, 0, 0]
    batch = windows.batch([2])
    assert batch.mask[0].tolist() == [False] * 108 + [True] * 20 and not batch.features[0, 108:].any()


@pytest.mark.parametrize("make", [training_windows, lambda d, **more: data.test_windows(d, split="train", **more)])
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
    windows = (training_windows if training else data.test_windows)(one, length, split="train")
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
    windows = data.test_windows(dataset, length=64, split=None)
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
    for make in (training_windows, data.test_windows):
        ours, theirs = make(held, length=48), make(mapped, length=48)
        assert np.array_equal(ours.start, theirs.start) and ours.lost == theirs.lost
        one, other = ours.batch(range(len(ours))), theirs.batch(range(len(theirs)))
        assert torch.equal(one.features, other.features) and torch.equal(one.mask, other.mask)


def test_windows_of_a_bare_recording(dataset):
    features = dataset.features("d")
    bare, windows = windows_of(features, 64, grid=TimeGrid(10)), data.test_windows(dataset, 64)
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


# Finding and reading real data.

def test_find_data(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "checkout" / "nbs").mkdir(parents=True)
    monkeypatch.delenv("SELFDETR_DATA", raising=False)
    monkeypatch.chdir(tmp_path / "checkout" / "nbs")
    assert data.find_data("x") == tmp_path / "shared" / "data" / "x"
    assert data.find_data("y") is None and data.find_data("x", tmp_path) is None
    monkeypatch.setenv("SELFDETR_DATA", str(tmp_path / "other"))
    assert data.find_data("x") == tmp_path / "other" / "x"


def real(name):
    found = data.find_data(name)
    if found is None:
        pytest.skip(f"the {name} data is not on this machine")
    return found


def test_vts_loads():
    vts = load_dataset(real("vts"))
    assert (len(vts.videos), len(vts.split("test")), len(vts.classes), vts.channels) == (99, 20, 5, 36)
    assert len(vts.ground_truth(None)) == 3671 and len(vts.ground_truth("test")) == 737
    assert {video.grid for video in vts.videos} == {TimeGrid(10)} and not any(vts.report.values())
    windows = training_windows(vts)
    assert len(windows) > 3000 and windows.lost < 0.01 * 3671
    for i in range(0, len(windows), 50):
        left, right = windows.to_seconds(i, (0.5, 1.0))
        video = vts.videos[windows.video[i]]
        inside = video.segments[(video.segments[:, 0] >= left) & (video.segments[:, 1] <= right)]
        back = windows.to_seconds(i, windows.targets[i]["segments"])
        distance = np.abs(inside[:, None] - back[None]).max(-1)
        assert distance.shape[0] == 0 or distance.min(1).max() <= 1e-6


def test_thumos14_annotations_are_read_and_reported():
    thumos = read_annotations(real("thumos14"))
    assert (len(thumos.split("train")), len(thumos.split("test")), len(thumos.classes)) == (200, 212, 20)
    assert {kind: len(cases) for kind, cases in thumos.report.items() if cases} == {"beyond": 26}
    assert sum(case.startswith("video_test_0000270") for case in thumos.report["beyond"]) == 22
    assert len(thumos.ground_truth("train")) == 3003 and len(thumos.ground_truth("test")) == 3358 - 26
