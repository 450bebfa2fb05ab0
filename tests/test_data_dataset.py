"""A folder is read whole or refused with its place and what to do; the hash follows all that matters."""

import copy
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sports import CHANNELS, COMPOSED, DECOMPOSED, annotation, database, edit, save, write

from selfdetr.data import features
from selfdetr.data.dataset import Dataset, Video, load_dataset, standardise
from selfdetr.data.files import DataError, find_data, read_json
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import training_windows

READ_FEATURES = features.read_features


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
    "unknown setting": (lambda f: write(f, strid=4), ["dataset.json", "unknown field 'strid'", "'stride'?"]),
    "setting of another kind": (lambda f: write(f, fps="10"), ["dataset.json", "fps is '10'", "without quotes"]),
    "unknown subset key": (lambda f: write(f, subsets={"dev": []}), ["dataset.json", "'dev'", "train, test"]),
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
def test_bad_input_is_refused_with_its_place_and_advice(folder, spoil, words, in_memory):
    spoil(folder)
    with pytest.raises(DataError) as caught:
        load_dataset(folder, in_memory=in_memory)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("arguments, words", [
    (dict(classes=["jump"]), ["video 'a'", "unknown label 'run' (5 times)", "jump"]),
    (dict(train="dev"), ["subset 'dev'", "named for train", "found: test, training", "dataset.json"]),
    (dict(train=[]), ["train", "unclear"]),
    (dict(train="test"), ["both train and test"]),
    (dict(test="tst"), ["subset 'tst'", "did you mean 'test'?"]),
    (dict(feature_format="h5"), ["feature_format is 'h5'", "npy, npz, pt"]),
    (dict(strid=4), ["unknown field 'strid'", "did you mean 'stride'?"]),
    (dict(feature_format="npzz"), ["feature_format is 'npzz'", "did you mean 'npz'?"]),
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


def test_a_file_for_a_folder_and_a_folder_for_a_file(folder):
    with pytest.raises(DataError, match="annotations.json: is a file; give the folder that holds it, '.*sports'"):
        load_dataset(folder / "annotations.json")
    with pytest.raises(DataError, match="a.npy: is a file; give the folder that holds one file of features for each"):
        load_dataset(folder, features="features/a.npy")
    with pytest.raises(DataError, match="features: is a folder; name the file in it"):
        read_json(folder / "features")


def test_arguments_come_before_dataset_json(folder):
    entries = database()
    write(folder, entries, subsets={"train": "test", "test": ["TRAINING"]}, classes=["run", "jump", "swim"])
    loaded = load_dataset(folder)
    assert [video.split for video in loaded.videos] == ["test"] * 3 + ["train"] * 2
    assert loaded.classes == ("run", "jump", "swim") and loaded.videos[0].labels.tolist() == [0, 1, 0]
    other = load_dataset(folder, train="Training", test="test", classes=["jump"], ignore_labels=["run"])
    assert [video.split for video in other.videos] == ["train"] * 3 + ["test"] * 2
    assert other.classes == ("jump",) and len(other.report["ignored"]) == 5


def test_options_may_be_numbers_and_names_of_numpy(folder):
    given = dict(classes=["jump", "run"], resize=8, min_seconds=1.0, in_memory=True)
    of_numpy = dict(classes=np.unique(["run", "jump"]), resize=np.int64(8), min_seconds=np.float32(1),
                    in_memory=np.True_)
    assert load_dataset(folder, **of_numpy).hash() == load_dataset(folder, **given).hash()


def test_a_place_in_another_form_is_found(folder, dataset):
    (folder / "features").rename(folder / DECOMPOSED)
    (folder / "annotations.json").rename(folder / f"{DECOMPOSED}.json")
    loaded = load_dataset(folder, features=COMPOSED, annotations=f"{COMPOSED}.json")
    assert loaded.hash() == dataset.hash()


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


@pytest.mark.skipif(find_data("vts") is None, reason="the vts data is not on this machine")
def test_vts_loads():
    vts = load_dataset(find_data("vts"))
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


def test_each_file_of_features_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(features, "read_features", lambda path, *a: read.append(path.name) or READ_FEATURES(path, *a))
    load_dataset(folder)
    assert sorted(read) == [f"{name}.npy" for name in "abcde"]


def test_the_hash_is_computed_once(folder):
    loaded = load_dataset(folder, in_memory=False, protocol="thumos14-212")
    before = loaded.hash()
    for path in [*folder.rglob("*.*")]:
        path.unlink()
    assert loaded.hash() == before  # nothing is read again


def test_memory_that_ends_is_an_error_with_the_way_out(folder, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("selfdetr.data.dataset._join_features", full)
    with pytest.raises(DataError, match='more memory than there is; write "in_memory": false'):
        load_dataset(folder)


def test_hundreds_of_mapped_recordings_need_few_open_files(tmp_path):
    entries = {f"v{i}": {"subset": "test" if i % 2 else "training", "duration": 2, "fps": 10,
                         "annotations": [annotation("run", 0.5, 1.5)]} for i in range(300)}
    folder = write(tmp_path / "many", entries)
    for name in entries:
        np.save(folder / "features" / f"{name}.npy", np.zeros((20, CHANNELS), np.float32))
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
from selfdetr.data import load_dataset, training_windows
windows = training_windows(load_dataset({str(folder)!r}, in_memory=False), length=16)
print([len(windows.batch(range(i, i + 100)).features) for i in (0, 100, 200)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[100, 100, 100]\n", done.stderr


def test_standardising_holds_the_features_once(peak_bytes):
    values = np.random.default_rng(0).standard_normal((200_001, 4), dtype=np.float32)
    nothing = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    video = Video("one", "train", 2e5, TimeGrid(1), 200_000, 0, *nothing)
    expected = values[:-1].mean(axis=0, dtype=np.float64), values[:-1].std(axis=0, dtype=np.float64)
    dataset = Dataset(Path("none"), ("action",), (video,), 4, values)
    most, dataset = peak_bytes(lambda: standardise(dataset), times=1)  # in place
    assert most < 0.5 * values.nbytes
    assert np.array_equal(dataset.scale, np.stack(expected).astype(np.float32))


def test_the_hash_of_a_mapped_recording_holds_a_block_of_it(tmp_path, peak_bytes):
    folder = tmp_path / "data"
    (folder / "features").mkdir(parents=True)
    database = {}
    for name, subset in (("a", "training"), ("b", "test")):
        np.save(folder / "features" / f"{name}.npy", np.ones((40_000, 64), np.float16))
        instances = [{"label": "x", "segment": [1, 2]}]
        database[name] = {"subset": subset, "duration": 4000, "annotations": instances}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    said = {"fps": 10, "stride": 1, "snippet": 1}
    (folder / "dataset.json").write_text(json.dumps(said | {"in_memory": False}))
    most, digest = peak_bytes(load_dataset(folder).hash)
    assert most < 0.6 * (folder / "features" / "a.npy").stat().st_size
    assert digest == load_dataset(folder, in_memory=True).hash()  # the same content
