"A detector gives what the evaluation gives, whatever way the features come; what it refuses."

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import close, refused, some_model

from selfdetr import detector as module
from selfdetr.checkpoint import save_model
from selfdetr.data.dataset import load_dataset
from selfdetr.data.features import drop_pages, resize_features
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import WindowConfig
from selfdetr.detector import Detector, read_detector, save_detector, write_detector
from selfdetr.inference import InferenceConfig, detect, detect_dataset

OPTIONS, SHORT = InferenceConfig(batch=5), WindowConfig(length=32)


@pytest.fixture(scope="module")
def dataset(tiny_folder):
    return load_dataset(tiny_folder, standardised=True)


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    "The folder of a model for that data."
    folder = save_model(some_model(), tmp_path_factory.mktemp("model"))
    save_detector(folder, dataset, OPTIONS, SHORT)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    "A copy of it, to be damaged."
    copy = tmp_path / "model"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture(scope="module")
def detector(made):
    return Detector.load(made, "cpu")


@pytest.fixture(scope="module")
def files(tiny_folder, dataset):
    "The feature files of the test recordings, as they were before standardisation."
    return [tiny_folder / "features" / f"{video.name}.npy" for video in dataset.split("test")]


def test_raw_files_give_what_the_standardised_data_set_gives(detector, dataset, files):
    expected = detect_dataset(some_model(), dataset, OPTIONS, SHORT)
    durations = {video.name: video.duration for video in dataset.split("test")}
    for path in files:
        own = expected[expected.video == path.stem].drop(columns="video").reset_index(drop=True)
        assert len(own) > 20 and close(detector.detect(path, duration=durations[path.stem]), own)
    one = detector.detect_many(files[0], duration=durations)
    assert close(one, expected[expected.video == files[0].stem].reset_index(drop=True))
    together = detector.detect_many(files, duration=durations)
    assert close(together, expected) and together.video.tolist() == expected.video.tolist()


def in_one_buffer(values, sizes):
    "Parts of some sizes, and in the end the rest; all of them are written into the same memory."
    buffer, first = np.empty_like(values), 0
    for size in [*sizes, len(values)]:
        part = values[first : first + size]
        buffer[: len(part)] = part
        yield buffer[: len(part)]
        first += len(part)


@settings(max_examples=15)
@given(steps=st.integers(1, 150), sizes=st.lists(st.integers(0, 60), max_size=6))
def test_parts_of_any_length_give_what_the_whole_gives(detector, files, steps, sizes):
    values = np.load(files[0])[:steps]
    expected = detector.detect(values)
    assert detector.detect(in_one_buffer(values, sizes)).equals(expected)


def test_every_kind_of_source_gives_the_same(detector, files, tmp_path):
    values = np.load(files[0])
    np.savez(tmp_path / "a.npz", values)
    torch.save(torch.from_numpy(values), tmp_path / "a.pt")
    np.save(tmp_path / "turned.npy", values.T)
    np.save(tmp_path / "part_1.npy", values[:50])
    np.save(tmp_path / "part_2.npy", values[50:])
    expected = detector.detect(values)
    assert list(expected) == ["start", "end", "label", "score"] and expected.score.is_monotonic_decreasing
    parts = [tmp_path / "part_1.npy", str(tmp_path / "part_2.npy")]
    sources = [files[0], str(files[0]), tmp_path / "a.npz", tmp_path / "a.pt", parts]
    for source in [*sources, np.load(files[0], mmap_mode="r"), torch.from_numpy(values), values.astype(float)]:
        assert detector.detect(source).equals(expected)
    assert detector.detect(tmp_path / "turned.npy", channels_first=True).equals(expected)
    assert detect(detector.model, (values - detector.config.scale[0]) / detector.config.scale[1],
                  detector.config.grid, detector.config.classes, OPTIONS, windows=SHORT).equals(expected)  # fmt: skip


def test_windows_of_several_recordings_share_batches_and_change_nothing(detector, files):
    values = np.load(files[0])
    recordings = {f"r{steps}": values[:steps] for steps in (5, 200, 20, 33, 64, 100)}
    together = detector.using(batch=7).detect_many(recordings)
    assert set(together.video) <= set(recordings)
    for name, features in recordings.items():
        own = together[together.video == name].reset_index(drop=True)
        assert close(own, detector.detect(features))
    names = [name for name, _ in detector.each(recordings)]
    assert names == list(recordings)


def test_the_model_stays_in_its_mode_and_gradients_stay_on(detector, files):
    detector.model.train()
    try:
        for _ in detector.each(files):
            assert torch.is_grad_enabled() and detector.model.training
        assert not detector.detect(files[0]).empty
    finally:
        detector.model.eval()


def test_memory_does_not_grow_with_the_length_of_what_comes_in_parts(detector, tmp_path, peak_bytes):
    "Of a path 38_detector and 54_scale say so."
    sure, path, peaks = detector.using(min_score=0.999, length=128, batch=4), tmp_path / "long.npy", []

    def detect():
        on_disk = np.load(path, mmap_mode="r")
        return sure.detect(on_disk[i : i + 500] for i in range(0, len(on_disk), 500))

    for steps in (5_000, 30_000):
        np.save(path, np.random.default_rng(0).standard_normal((steps, 8), dtype=np.float32))
        peaks.append(peak_bytes(detect, times=1)[0])
    assert peaks[1] < 1.5 * peaks[0] < 0.7 * path.stat().st_size


def resident(path):
    "KiB of a mapped file that the process holds in memory; None where the system does not say."
    if not Path("/proc/self/smaps").exists():
        return None
    held, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            held += int(line.split()[1])
    return held


def test_the_pages_of_a_map_are_given_back(detector, tmp_path):
    path = tmp_path / "long.npy"
    np.save(path, np.zeros((60_000, 8), np.float32))
    features = np.load(path, mmap_mode="r")
    if resident(path) is None:
        pytest.skip("the system does not say what is resident")
    assert float(features.sum()) == 0 and resident(path) > 1500
    drop_pages(features)
    assert resident(path) < 100
    detector.using(min_score=0.999, length=256, test_overlap=0.0).detect(features)
    assert resident(path) < 500


@pytest.mark.parametrize("steps", [1, 31, 32, 33])
def test_short_recordings_work(detector, files, steps):
    found = detector.detect(np.load(files[0])[:steps], grid=TimeGrid(10))
    assert not found.empty and found.start.min() >= 0 and found.end.max() <= steps / 10


@pytest.mark.parametrize("features, message", [
    (np.zeros((0, 8)), "empty"),
    ([], "no features came"),
    ([np.zeros((5, 8)), np.zeros((3, 7))], "from step 5 on: has 7 channels, the model was trained on 8"),
    ([np.zeros((5, 8)), np.full((3, 8), np.inf)], "from step 5 on: has NaN or infinite values in 3 steps"),
    (np.zeros((8, 5)), "(channels, steps)?"),
    (np.zeros(8), "shape (8,)"),
    (np.full((9, 8), "x"), "not numbers"),
    ("lost.npy", "lost.npy"),
    ({"a": np.zeros((5, 8))}, "detect_many"),
])  # fmt: skip
def test_features_that_cannot_be_used(detector, features, message):
    assert message in refused(lambda: detector.detect(features))


def test_names_of_several_recordings(detector, files):
    assert "another file" in refused(lambda: detector.detect_many([files[0], files[0]]))
    assert "paths of their files" in refused(lambda: detector.detect_many([np.zeros((5, 8))]))
    assert "no recordings" in refused(lambda: detector.detect_many([]))
    assert "times are given" in refused(lambda: detector.detect_many(files, fps={files[0].stem: 5.0}))


def test_times_follow_the_grid(detector, files):
    usual, values = detector.detect(files[0]), np.load(files[0])
    fps = detector.config.grid.fps
    half = detector.detect(files[0], fps=fps / 2)
    assert np.allclose(half[["start", "end"]], 2 * usual[["start", "end"]]) and half.score.equals(usual.score)
    by_name = detector.detect_many({"slow": values, "usual": values}, fps={"slow": fps / 2, "usual": fps})
    for name, expected in (("slow", half), ("usual", usual)):
        assert close(by_name[by_name.video == name], expected)
    assert "part of a grid" in refused(lambda: detector.detect(values, grid=TimeGrid(10), fps=10.0))
    assert "duration is 0" in refused(lambda: detector.detect(values, duration=0))


def test_frame_rates_that_varied_are_warned_of(detector, files):
    varied = Detector(detector.model, replace(detector.config, fps_varies=True))
    with pytest.warns(UserWarning, match="training videos varied"):
        varied.detect(files[0])
    assert varied.detect(files[0], fps=10.0).equals(detector.detect(files[0], fps=10.0))


def test_a_model_of_resized_recordings(dataset, made, files, tmp_path):
    dataset.resize = 48
    try:
        save_detector(tmp_path, dataset, OPTIONS, SHORT)
    finally:
        dataset.resize = None
    for name in ("config.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    detector, values = Detector.load(tmp_path, "cpu"), np.load(files[0])
    scaled = (resize_features(values, 48) - dataset.scale[0]) / dataset.scale[1]
    expected = detect(detector.model, scaled, TimeGrid(48 / 20), dataset.classes, OPTIONS, 20.0, SHORT)
    assert close(detector.detect(files[0], duration=20.0), expected)
    assert close(detector.detect(values, grid=TimeGrid(len(values) / 20)), expected)
    assert "duration=" in refused(lambda: detector.detect(files[0]))
    assert "resized to 48 steps" in refused(lambda: detector.detect(iter([values]), duration=20.0))


def test_the_file_holds_what_the_data_set_knows(dataset, made, tmp_path):
    config = read_detector(made)
    assert np.array_equal(config.scale, dataset.scale) and config.scale.dtype == np.float32
    assert config.classes == dataset.classes and config.resize is None
    assert config.inference == OPTIONS and config.windows == SHORT
    write_detector(tmp_path, config)
    assert (tmp_path / "detector.json").read_text() == (made / "detector.json").read_text()


def test_cut_and_voting_are_kept_and_an_older_file_has_neither(dataset, made, tmp_path, files):
    shutil.copytree(made, tmp_path / "model")
    path = save_detector(tmp_path / "model", dataset, replace(OPTIONS, cut=0.3, voting=0.6), SHORT)
    new, content = Detector.load(path.parent, "cpu"), json.loads(path.read_text())
    assert (new.config.inference.cut, new.config.inference.voting) == (0.3, 0.6)
    assert new.detect(files[0]).equals(Detector.load(made, "cpu").using(cut=0.3, voting=0.6).detect(files[0]))
    del content["inference"]["cut"], content["inference"]["voting"], content["windows"]["random"]
    path.write_text(json.dumps(content))
    old = Detector.load(path.parent, "cpu")
    assert old.config.inference == OPTIONS and old.config.windows == SHORT
    assert old.detect(files[0]).equals(Detector.load(made, "cpu").detect(files[0]))


def test_frame_rates_that_vary_are_noted(tiny, tmp_path):
    rates = [10.0, 25.0, 30.0, 30.0, 30.0]
    tiny.videos = tuple(replace(v, grid=replace(v.grid, fps=r)) for v, r in zip(tiny.videos, rates, strict=True))
    save_detector(tmp_path, tiny, OPTIONS, SHORT)
    config = read_detector(tmp_path)
    assert config.grid.fps == 30 and config.fps_varies and config.scale is None


def test_settings_of_detection_and_of_windows_can_be_changed(detector):
    other = detector.using(min_score=0.5, length=64).config
    assert (other.inference.min_score, other.windows.length, other.windows.test_overlap) == (0.5, 64, 0.25)
    with pytest.raises(TypeError, match="colour"):
        detector.using(colour=1)
    for name in ("overlap", "keep"):  # of training windows: a detector has no use for them
        with pytest.raises(TypeError, match=name):
            detector.using(**{name: 0.5})


def changed(name, **values):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def removed(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def test_detections_that_are_cut_off_are_warned_of(detector, files, monkeypatch):
    "Two hundred are meant for minutes: in a longer recording those that are not kept may matter."
    path, best = files[0], detector.detect(files[0]).score
    monkeypatch.setattr(module, "NOTABLE", best[1])
    with pytest.warns(UserWarning, match="the 2 best detections are kept, and the last of them has a score of"):
        assert len(detector.using(most=2).detect(path)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.using(most=3).detect(path)  # the third is not notable
        detector.using(most=10**6).detect(path)


@pytest.mark.parametrize("damage, message", [
    (removed("detector.json"), r"detector\.json: missing.*save_detector"),
    (removed("detector.json", "config.json"), "no model is in this folder"),
    (removed("config.json"), r"config\.json"),
    (removed("checkpoint.safetensors"), r"checkpoint\.safetensors"),
    (changed("detector.json", version=1), "has version 1, this code reads 2; save it again"),
    (changed("detector.json", classes=["a", "b"]), r"detector\.json: 2 classes, the model has 3"),
    (changed("detector.json", classes=["a", "b", ""]), "classes: a name is ''"),
    (changed("detector.json", mean=[0, 0], deviation=[1, 1]), "not of 8 channels"),
    (changed("detector.json", mean=[0, 0]), "mean and deviation do not fit"),
    (changed("detector.json", mean=[0] * 8, deviation=[1] * 7 + [1e-60]), "deviations above 0"),
    (changed("detector.json", resize=0), "resize is 0; write a number of steps"),
    (changed("detector.json", grid={"fps": 0}), "fps is 0"),
    (changed("detector.json", inference={"speed": 3}), "speed"),
    (changed("detector.json", inference={"nms": "softer"}), "nms is 'softer'; did you mean 'soft'"),
    (changed("detector.json", windows={"length": 10**6}), "length is 1000000"),
    (changed("config.json", classes=4), r"checkpoint\.safetensors"),
    (changed("config.json", colour=4), "unknown field"),
    (lambda folder: (folder / "detector.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "checkpoint.safetensors").write_bytes(b"cut"), r"checkpoint\.safetensors"),
])  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    assert re.search(message, refused(lambda: Detector.load(folder, "cpu")))


def test_a_misspelt_path_is_named(made):
    assert "no such folder; check the path" in refused(lambda: Detector.load(made / "nowhere"))
    assert "nowhere.onnx: no such file; check the path" in refused(lambda: Detector.load(made / "nowhere.onnx"))
    assert "is a file; give the folder of the model" in refused(lambda: Detector.load(made / "config.json"))


@pytest.mark.parametrize("device", ["tpu", "cudax", "cuda:9", "cuda:", "mps", "", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_before_any_file_is_read(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("nowhere", "nowhere.onnx"):
        assert "choose one of" in refused(lambda name=name: Detector.load(tmp_path / name, device))


@pytest.mark.parametrize("there, device, place", [
    ((True, False), "cuda:1", torch.device("cuda", 1)),
    ((True, False), "auto", torch.device("cuda")),
    ((False, True), "mps", torch.device("mps")),
    ((False, True), "auto", torch.device("mps")),
    ((False, False), "auto", torch.device("cpu")),
])  # fmt: skip
def test_the_model_goes_where_the_trainer_would_put_it(made, monkeypatch, there, device, place):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    places, load = [], module.load_model
    monkeypatch.setattr(module, "load_model", lambda path, to: (places.append(to), load(path))[1])
    Detector.load(made, device)
    assert places == [place]
