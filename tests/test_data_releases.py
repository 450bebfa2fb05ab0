"""THUMOS14 and ActivityNet-v1.3 as they are released: read, trained on, judged; where settings come from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sports import database, edit, write

from selfdetr import study
from selfdetr.data.annotations import AnnotatedVideo
from selfdetr.data.dataset import load_dataset
from selfdetr.data.features import resize_features
from selfdetr.data.files import DataError, find_data, read_json
from selfdetr.data.releases import RELEASES, all_settings, compare_rates, stated_rates
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import training_windows
from selfdetr.fusion import read_video_scores
from selfdetr.study.compute import judge_detections

SOME = ("video_validation_0000051", "video_validation_0000053", "video_test_0000004", "video_test_0000270")


def write_features(folder, name, steps, channels, form="npy", channels_first=False):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(steps).standard_normal((steps, channels), dtype=np.float32)
    stored = array.T if channels_first else array
    if form == "pt":
        torch.save(torch.from_numpy(stored.copy()), folder / f"{name}.pt")
    else:
        {"npy": np.save, "npz": np.savez}[form](folder / f"{name}.{form}", stored)
    return array


@pytest.fixture
def thumos(tmp_path):
    """Four real videos in THUMOS14's layout: real annotations, made-up features of the real lengths."""
    real = find_data("thumos14")
    if real is None:
        pytest.skip("the THUMOS14 annotations are not here")
    entries = read_json(real / "annotations.json")["database"]
    missing = [name for name in SOME if name not in entries]
    assert not missing
    folder = tmp_path / "thumos14"
    (folder / "annotations").mkdir(parents=True)
    chosen = {"version": "thumos14", "database": {name: entries[name] for name in SOME}}
    (folder / "annotations" / "thumos14.json").write_text(json.dumps(chosen))

    def fill(form="npy", channels_first=False):
        return {name: write_features(folder / "i3d_features", name, thumos_steps(entries[name]), 2048, form,
                                     channels_first) for name in SOME}
    return folder, fill


def thumos_steps(entry):
    return int((entry["duration"] * entry["fps"] - 16) / 4) + 1


@pytest.mark.parametrize("form, channels_first", [("npy", False), ("npz", True), ("pt", False)])
def test_thumos14_is_read_as_it_is_released(thumos, form, channels_first):
    folder, fill = thumos
    arrays = fill(form, channels_first)
    loaded = load_dataset(folder, release="thumos14", feature_format=form, channels_first=channels_first)
    assert [video.name for video in loaded.split("train")] == list(SOME[:2]) and loaded.channels == 2048
    assert loaded.protocol == "thumos14-210" and loaded.resize is None and "length" not in loaded.report
    for video in loaded.videos:
        assert (video.grid.stride, video.grid.snippet) == (4, 16)
        assert np.array_equal(loaded.features(video.name), arrays[video.name])
    # A window of 128 steps is 17 s; what it holds lies in the video where the annotation has it.
    windows = training_windows(loaded)
    for i in range(0, len(windows), 7):
        video = loaded.videos[windows.video[i]]
        for start, end in windows.to_seconds(i, windows.targets[i]["segments"]):
            inside = np.minimum(video.segments[:, 1], end) - np.maximum(video.segments[:, 0], start)
            assert inside.max() > 0.99 * (end - start)


@pytest.mark.filterwarnings("ignore:.*fps is")
def test_what_the_folder_says_goes_before_the_release(thumos):
    folder, fill = thumos
    fill()
    (folder / "dataset.json").write_text(json.dumps({"stride": 8, "fps": 25, "protocol": "thumos14-212"}))
    loaded = load_dataset(folder, release="thumos14")
    assert loaded.protocol == "thumos14-212" and loaded.videos[0].grid.stride == 8 and loaded.videos[0].grid.fps == 25


def test_thumos14_is_trained_on_and_judged_by_its_protocol(thumos, tmp_path):
    folder, fill = thumos
    fill()
    data = study.open_dataset("thumos14", "smoke", tmp_path)
    assert data.protocol == "thumos14-210"
    small = {"model.dim": 16, "model.hidden": 16, "model.heads": 2, "model.norm_groups": 2, "train.epochs": 1}
    spec = study.make_spec("thumos14", "smoke", data, overrides=small | {"train.milestones": [1]})
    found = study.run(spec, data, runs_root=tmp_path / "runs", device="cpu", progress=False)
    assert found.metrics["protocol"] == "thumos14-210"
    assert list(found.metrics["mAP"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    entries = read_json(folder / "annotations" / "thumos14.json")["database"]
    counting = [a for a in entries["video_test_0000004"]["annotations"] if a["label"] != "Ambiguous"]
    assert found.metrics["test_instances"] == len(counting)  # the other test video is one that the protocol drops


@pytest.fixture
def activitynet(tmp_path):
    """Eight invented recordings in ActivityNet's layout: file names have `v_` before the JSON's identifiers."""
    folder, random = tmp_path / "activitynet13", np.random.default_rng(0)
    entries = {}
    for i in range(8):
        duration = float(random.uniform(20, 200))
        start, end = sorted(random.uniform(0, duration, 2))
        label = ("Archery", "Ballet", "Bathing dog")[i % 3]
        subset = "training" if i < 5 else "validation"
        entries[f"--id{i}"] = {"subset": subset, "duration": duration, "resolution": "320x240",
                               "annotations": [{"label": label, "segment": [start, end]}]}
        write_features(folder / "tsp_features", f"v_--id{i}", int(duration), 12)
    entries["--id0"]["annotations"].append({"label": "Archery", "segment": [3.0, 3.01]})
    entries["--hidden"] = {"subset": "testing", "duration": 50.0, "annotations": []}
    content = {"version": "VERSION 1.3", "taxonomy": [], "database": entries}
    (folder / "activity_net.v1-3.min.json").write_text(json.dumps(content))
    return folder


def write_scores(folder, value=0.9):
    scores = {f"--id{i}": [value, 0.05, 0.01] for i in range(8)}
    (folder / "scores.json").write_text(json.dumps({"class": ["Archery", "Ballet", "Bathing dog"], "results": scores}))
    (folder / "dataset.json").write_text(json.dumps({"video_scores": "scores.json"}))


def test_activitynet_is_read_resized(activitynet):
    loaded = load_dataset(activitynet, release="activitynet13")
    assert {video.steps for video in loaded.videos} == {192} and len(loaded.classes) == 3
    assert loaded.report["short"] == ["--id0: Archery 3-3.01 s"] and loaded.report["unused"] == ["--hidden"]
    for video in loaded.videos:
        raw = np.load(activitynet / "tsp_features" / f"v_{video.name}.npy")
        assert np.array_equal(loaded.features(video.name), resize_features(raw, 192))
        steps = video.grid.to_steps(video.segments)
        assert np.allclose((steps + 0.5) / 192, video.segments / video.duration)
    windows = training_windows(loaded, 192)
    assert len(windows) == 5 and (windows.valid == 192).all()


def test_an_instance_of_no_length_is_dropped_and_counted(activitynet):
    path = activitynet / "activity_net.v1-3.min.json"
    content = read_json(path)
    content["database"]["--id1"]["annotations"].append({"label": "Ballet", "segment": [0, 0]})
    path.write_text(json.dumps(content))
    loaded = load_dataset(activitynet, release="activitynet13")
    assert loaded.report["no length"] == ["--id1: Ballet 0-0 s"] and len(loaded.ground_truth(None)) == 8
    content["database"]["--id1"]["annotations"][-1]["segment"] = [0.5, 0]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="--id1', annotation 1: ends at 0 s, before its start at 0.5 s"):
        load_dataset(activitynet, release="activitynet13")


def test_a_subset_without_annotations_is_said_to_be_that(activitynet):
    for split in ("train", "test"):
        words = f"subset 'testing' has 1 video and no annotations; name another for {split}"
        with pytest.raises(DataError, match=words):
            load_dataset(activitynet, release="activitynet13", **{split: "testing"})
    both = load_dataset(activitynet, release="activitynet13", train=["training", "testing"])
    assert len(both.split("train")) == 5  # --hidden has no features


def test_folders_that_are_judged_differently_have_different_hashes(activitynet):
    path, hashes, scores = activitynet / "activity_net.v1-3.min.json", [], []
    content = read_json(path)
    for _ in range(2):
        path.write_text(json.dumps(content))
        loaded = load_dataset(activitynet, release="activitynet13")
        found = loaded.ground_truth("test").assign(score=0.9)
        scores.append(judge_detections(found, loaded).average)
        hashes.append(loaded.hash())
        content["database"]["--id5"]["annotations"] *= 2
    assert scores[0] == 1 and scores[1] < 0.9 and hashes[0] != hashes[1]


def test_resizing_agrees_with_numpy():
    features = np.random.default_rng(1).standard_normal((37, 5))
    for steps in (1, 8, 37, 100):
        places = (np.arange(steps) + 0.5) * 37 / steps - 0.5
        expected = np.stack([np.interp(places, np.arange(37), channel) for channel in features.T], axis=1)
        assert np.allclose(resize_features(features, steps), expected, atol=1e-5)


def test_activitynet_takes_its_classes_from_video_scores(activitynet, tmp_path):
    write_scores(activitynet)
    data = study.open_dataset("activitynet13", "smoke", tmp_path)
    assert data.classes == ("action",)
    spec = study.make_spec("activitynet13", "smoke", data)
    assert spec.model.classes == 1 and spec.windows.length == 192
    found = study.run(spec, data, runs_root=tmp_path / "runs", device="cpu", progress=False)
    assert found.metrics["protocol"] == "activitynet13" and len(found.metrics["mAP"]) == 10
    assert list(found.metrics["mAP"])[:2] == ["0.5", "0.55"] and found.metrics["test_instances"] == 3
    results = json.loads((found.folder / "detections.json").read_text())["results"]
    assert {d["label"] for items in results.values() for d in items} == {"Archery"}  # the best class of every video
    assert max(d["score"] for items in results.values() for d in items) <= 0.9
    before = data.hash()
    write_scores(activitynet, 0.8)
    assert study.open_dataset("activitynet13", "smoke", tmp_path).hash() != before


def test_video_scores_of_one_s_own_data_need_no_protocol(activitynet, tmp_path):
    write_scores(activitynet)
    own = activitynet.rename(tmp_path / "mine")
    (own / "dataset.json").write_text(json.dumps({
        "video_scores": "scores.json", "annotations": "activity_net.v1-3.min.json", "features": "tsp_features",
        "prefix": "v_", "resize": 64, "subsets": {"train": "training", "test": "validation"}}))
    data = study.open_dataset(str(own), "smoke", tmp_path)
    found = study.run(study.make_spec(str(own), "smoke", data), data, runs_root=tmp_path / "runs", device="cpu",
                      progress=False)
    assert found.metrics["protocol"] == "test split" and found.metrics["test_instances"] == 3
    assert set(found.metrics["per_class"]) == {"Archery", "Ballet", "Bathing dog"}


@pytest.mark.parametrize("change, words", [
    (dict(prefix="video_"), ["looked for video_--id0.npy", "found: v_--id0.npy", "set prefix"]),
    (dict(features="i3d"), ["i3d", "no such folder"]),
    (dict(annotations="anet.json"), ["anet.json", "cannot be read"]),
    (dict(test="test"), ["no video is in subset 'test'", "found: testing, training, validation"]),
    (dict(video_scores="cuhk.json"), ["cuhk.json", "no such file of video scores"]),
    (dict(resize=0), ["resize is 0"]),
    (dict(test="validate"), ["no video is in subset 'validate'", "did you mean 'validation'?"]),
])
def test_a_release_that_does_not_fit_is_refused(activitynet, change, words):
    with pytest.raises(DataError) as caught:
        load_dataset(activitynet, release="activitynet13", **change)
    for word in words:
        assert word in str(caught.value)


def test_scores_that_lack_a_video_are_refused(activitynet, tmp_path):
    write_scores(activitynet)
    content = read_json(activitynet / "scores.json")
    del content["results"]["--id6"]
    (activitynet / "scores.json").write_text(json.dumps(content))
    assert len(read_video_scores(content)) == 21
    with pytest.raises(DataError, match="no class scores for 1 test videos, such as '--id6'"):
        study.open_dataset("activitynet13", "smoke", tmp_path)


def test_an_unknown_protocol_is_refused_before_training(activitynet, tmp_path):
    (activitynet / "dataset.json").write_text(json.dumps({"protocol": "activitynet12"}))
    with pytest.raises(DataError, match="dataset.json: protocol 'activitynet12' is unknown; .*activitynet13"):
        study.open_dataset("activitynet13", "smoke", tmp_path)


def test_a_protocol_that_the_annotations_cannot_serve_is_refused_before_training(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    about = read_json(folder / "dataset.json") | {"protocol": "activitynet13"}
    (folder / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="no video is in subset 'validation'"):
        study.open_dataset(str(folder), "smoke")
    assert study.open_dataset(str(folder), "smoke", inner=True).protocol is None


def test_an_option_that_is_not_given_hides_nothing_of_the_folder(tmp_path):
    for name in ("groundTruth", "splits"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({"annotations": "mine.json"}))
    assert all_settings(tmp_path, annotations=None) == all_settings(tmp_path)
    assert all_settings(tmp_path).annotations == "mine.json"


def test_the_releases_are_named_where_one_is_misspelt(activitynet):
    with pytest.raises(DataError, match=r"did you mean 'activitynet13'\? It is one of " + ", ".join(RELEASES)):
        load_dataset(activitynet, release="activitynet")


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
    short = [AnnotatedVideo(name, "train", 5.0, 10.15, *nothing) for name in "abc"]
    grids, steps = dict.fromkeys("abc", TimeGrid(10)), dict.fromkeys("abc", 50)
    stated = stated_rates(short, grids, {})
    assert stated == dict.fromkeys("abc", 10.15)
    assert "both fit, so find out" in compare_rates(short, grids, steps, stated)
