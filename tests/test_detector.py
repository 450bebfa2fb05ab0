"A detector gives what the evaluation gives, whatever way the features come; what it refuses; its command; its export."

import errno
import json
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdetr import deploy
from selfdetr.data import DataError, TimeGrid, drop_pages, load_dataset, test_windows, windows_of, resize_features
from selfdetr.deploy import Detector, export_onnx, main
from selfdetr.inference import (
    InferenceConfig,
    detect,
    detect_dataset,
    detect_windows,
    merge,
    read_detector,
    save_detector,
    write_detector,
)
from selfdetr.model import ModelConfig, make_model, save_model

OPTIONS = InferenceConfig(window=32, batch=5)
SIZE = dict(dim=32, heads=4, hidden=32, queries=8, norm_groups=4, encoder_layers=1, decoder_layers=2)


def some_model(**changes):
    "A model whose scores differ from window to window, which those of an untrained one hardly do."
    torch.manual_seed(3)
    model = make_model(ModelConfig(channels=8, classes=3, **SIZE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def dataset(tiny_folder):
    return load_dataset(tiny_folder, standardised=True)


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    "The folder of a model for that data."
    folder = save_model(some_model(), tmp_path_factory.mktemp("model"))
    save_detector(folder, dataset, OPTIONS)
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


def refused(action):
    with pytest.raises(DataError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def close(one, other, columns=("start", "end", "score"), atol=1e-4):
    return one.label.tolist() == other.label.tolist() and np.allclose(one[[*columns]], other[[*columns]], atol=atol)


def test_raw_files_give_what_the_standardised_data_set_gives(detector, dataset, files):
    expected = detect_dataset(some_model(), test_windows(dataset, 32), OPTIONS)
    durations = {video.name: video.duration for video in dataset.split("test")}
    for path in files:
        own = expected[expected.video == path.stem].drop(columns="video").reset_index(drop=True)
        assert len(own) > 20 and close(detector.detect(path, duration=durations[path.stem]), own)
    together = detector.detect_many(files, duration=durations)
    assert close(together, expected) and together.video.tolist() == expected.video.tolist()


def test_one_recording_is_to_the_bit_what_all_its_windows_at_once_give(detector, dataset, files):
    name = files[0].stem
    windows = windows_of(dataset.features(name), 32, OPTIONS.overlap, detector.config.grid)
    expected = merge(detect_windows(some_model(), windows, OPTIONS), OPTIONS).drop(columns="video")
    found = detector.detect(files[0])
    assert found.drop(columns="label").equals(expected.drop(columns="label"))
    assert found.label.tolist() == [dataset.classes[i] for i in expected.label]


def in_one_buffer(values, sizes):
    "Parts of some sizes, and in the end the rest; all of them are written into the same memory."
    buffer, first = np.empty_like(values), 0
    for size in [*sizes, len(values)]:
        part = values[first : first + size]
        buffer[: len(part)] = part
        yield buffer[: len(part)]
        first += len(part)


@settings(max_examples=25)
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
                  detector.config.grid, detector.config.classes, OPTIONS).equals(expected)  # fmt: skip


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


@pytest.mark.parametrize("kind", ["path", "map", "parts"])
def test_memory_does_not_grow_with_the_length(detector, tmp_path, kind, peak_bytes):
    sure, path = detector.using(min_score=0.999, window=256, batch=4), tmp_path / "long.npy"

    def detect():
        on_disk = np.load(path, mmap_mode="r")
        parts = (on_disk[i : i + 500] for i in range(0, len(on_disk), 500))
        return sure.detect({"path": path, "map": on_disk, "parts": parts}[kind])

    peaks = []
    for steps in (6_000, 48_000):
        np.save(path, np.random.default_rng(0).standard_normal((steps, 8), dtype=np.float32))
        peaks.append(peak_bytes(detect)[0])
    assert peaks[1] < 2 * peaks[0] < 0.7 * path.stat().st_size


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
    detector.using(min_score=0.999, window=256, overlap=0.0).detect(features)
    assert resident(path) < 500


def test_changes_to_a_private_map_are_not_dropped(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((50, 8), np.float32))
    features = np.load(tmp_path / "a.npy", mmap_mode="c")
    features[7] = 1
    drop_pages(features)
    assert features[7].min() == 1 and np.load(tmp_path / "a.npy").max() == 0


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
    assert "part of a grid" in refused(lambda: detector.detect(values, TimeGrid(10), 10.0))
    assert "duration is 0" in refused(lambda: detector.detect(values, duration=0))


def test_frame_rates_that_varied_are_warned_of(detector, files):
    varied = Detector(detector.model, replace(detector.config, fps_varies=True))
    with pytest.warns(UserWarning, match="training videos varied"):
        varied.detect(files[0])
    assert varied.detect(files[0], fps=10.0).equals(detector.detect(files[0], fps=10.0))


@settings(max_examples=30)
@given(steps=st.integers(1, 40), wanted=st.integers(1, 60))
def test_resizing_is_that_of_pytorch(steps, wanted):
    values = np.random.default_rng(steps).standard_normal((steps, 3)).astype(np.float32)
    rows = torch.from_numpy(values).T[None]
    expected = torch.nn.functional.interpolate(rows, wanted, mode="linear", align_corners=False)[0].T
    assert np.allclose(resize_features(values, wanted), expected, atol=1e-5)


def test_a_model_of_resized_recordings(dataset, made, files, tmp_path):
    dataset.resize = 48
    try:
        save_detector(tmp_path, dataset, OPTIONS)
    finally:
        dataset.resize = None
    for name in ("config.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    detector, values = Detector.load(tmp_path, "cpu"), np.load(files[0])
    scaled = (resize_features(values, 48) - dataset.scale[0]) / dataset.scale[1]
    expected = detect(detector.model, scaled, TimeGrid(48 / 20), dataset.classes, OPTIONS, duration=20.0)
    assert close(detector.detect(files[0], duration=20.0), expected)
    assert close(detector.detect(values, grid=TimeGrid(len(values) / 20)), expected)
    assert "duration=" in refused(lambda: detector.detect(files[0]))
    assert "resized to 48 steps" in refused(lambda: detector.detect(iter([values]), duration=20.0))


def test_the_file_holds_what_the_data_set_knows(dataset, made, tmp_path):
    config = read_detector(made)
    assert np.array_equal(config.scale, dataset.scale) and config.scale.dtype == np.float32
    assert config.classes == dataset.classes and config.inference == OPTIONS and config.resize is None
    write_detector(tmp_path, config)
    assert (tmp_path / "detector.json").read_text() == (made / "detector.json").read_text()


def test_frame_rates_that_vary_are_noted(tiny, tmp_path):
    rates = [10.0, 25.0, 30.0, 30.0, 30.0]
    tiny.videos = tuple(replace(v, grid=replace(v.grid, fps=r)) for v, r in zip(tiny.videos, rates, strict=True))
    save_detector(tmp_path, tiny, OPTIONS)
    config = read_detector(tmp_path)
    assert config.grid.fps == 30 and config.fps_varies and config.scale is None


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
    monkeypatch.setattr(deploy, "NOTABLE", best[1])
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
    (changed("detector.json", version=2), "has version 2, this code reads 1"),
    (changed("detector.json", classes=["a", "b"]), r"detector\.json: 2 classes, the model has 3"),
    (changed("detector.json", scale={"mean": [0, 0], "deviation": [1, 1]}), "not of 8 channels"),
    (changed("detector.json", scale={"mean": [0, 0]}), "not as save_detector writes it"),
    (changed("detector.json", grid={"fps": 0}), "fps is 0"),
    (changed("detector.json", inference={"speed": 3}), "speed"),
    (changed("config.json", classes=4), r"checkpoint\.safetensors"),
    (changed("config.json", colour=4), "unknown fields"),
    (lambda folder: (folder / "detector.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "checkpoint.safetensors").write_bytes(b"cut"), r"checkpoint\.safetensors"),
])  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    assert re.search(message, refused(lambda: Detector.load(folder, "cpu")))


def test_a_run_of_older_code_and_other_places(folder):
    (folder / "detector.json").unlink()
    (folder / "spec.json").write_text("{}")
    assert "run the study again" in refused(lambda: Detector.load(folder))
    assert "check the path" in refused(lambda: Detector.load(folder / "nowhere"))


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
    places, load = [], deploy.load_model
    monkeypatch.setattr(deploy, "load_model", lambda path, to: (places.append(to), load(path))[1])
    Detector.load(made, device)
    assert places == [place]


CPU = "CPUExecutionProvider"


@pytest.mark.parametrize("there, providers, device, chosen", [
    ((True, False), True, "auto", [("CUDAExecutionProvider", {"device_id": 0}), CPU]),
    ((True, False), True, "cuda:1", [("CUDAExecutionProvider", {"device_id": 1}), CPU]),
    ((True, False), False, "auto", [CPU]),
    ((True, False), False, "cuda", "onnxruntime-gpu"),
    ((False, True), False, "auto", [CPU]),
    ((False, True), False, "mps", "on 'cpu' or 'cuda'"),
    ((False, False), False, "cpu", [CPU]),
])  # fmt: skip
def test_where_an_exported_network_runs(monkeypatch, there, providers, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    kinds = ["CUDAExecutionProvider"] * providers + [CPU]
    if isinstance(chosen, str):
        assert chosen in refused(lambda: deploy.onnx_providers(device, kinds))
    else:
        assert deploy.onnx_providers(device, kinds) == chosen


def test_the_command_writes_what_the_detector_finds(made, detector, files, tmp_path, capsys):
    target = tmp_path / "new" / "found.json"
    assert main([str(made), str(files[0].parent), "-o", str(target), "--device", "cpu"]) == 0
    results = json.loads(target.read_text())["results"]
    every = sorted(files[0].parent.iterdir())
    expected = detector.detect_many(every)
    assert set(results) == {path.stem for path in every} and sum(map(len, results.values())) == len(expected)
    for name, entries in results.items():
        own = expected[expected.video == name]
        times = np.array([(*e["segment"], e["score"]) for e in entries])
        assert np.allclose(times, own[["start", "end", "score"]], atol=1e-5)
    shown = capsys.readouterr()
    assert f"{len(expected)} detections" in shown.out and shown.err == "" and [*target.parent.iterdir()] == [target]


def test_options_of_the_command(made, detector, files, tmp_path):
    np.save(tmp_path / "a.npy", np.load(files[0]).T)
    target, fps = tmp_path / "found.json", detector.config.grid.fps
    options = ["--channels-first", "--top", "3", "--fps", str(fps / 2), "--min-score", "0.01", "--quiet"]
    assert main([str(made), str(tmp_path / "a.npy"), "-o", str(target), *options]) == 0
    entries, best = json.loads(target.read_text())["results"]["a"], detector.detect(files[0]).head(3)
    assert np.allclose([e["segment"] for e in entries], 2 * best[["start", "end"]], atol=1e-5)
    assert main([str(made), str(files[0]), "-o", str(target), "--min-score", "1"]) == 0
    assert json.loads(target.read_text())["results"] == {files[0].stem: []}


@pytest.fixture
def place(folder, files, tmp_path):
    "Files for the command, good and bad, in one folder."
    (tmp_path / "good.npy").write_bytes(files[0].read_bytes())
    np.save(tmp_path / "wide.npy", np.zeros((20, 9)))
    np.save(tmp_path / "hole.npy", np.full((20, 8), np.nan))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "good.npy").write_bytes(files[0].read_bytes())
    (tmp_path / "bad").mkdir()
    for path in folder.iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    changed("detector.json", classes=["a"])(tmp_path / "bad")
    resized = tmp_path / "resized"
    resized.mkdir()
    for path in folder.iterdir():
        (resized / path.name).write_bytes(path.read_bytes())
    changed("detector.json", resize=48)(resized)
    return tmp_path


@pytest.mark.parametrize("arguments, message", [
    ("model lost.npy", "lost.npy"),
    ("model wide.npy", "wide.npy: has 9 channels, the model was trained on 8"),
    ("model pickled.npy", "never loaded"),
    ("model text.csv", "unknown feature format"),
    ("model empty", "no feature file"),
    ("model good.npy twin", "rename one"),
    ("model good.npy hole.npy wide.npy", "hole.npy: has NaN or infinite values in 20 steps, first in step 0"),
    ("model good.npy hole.npy wide.npy", "(and 1 more; --skip-bad"),
    ("model hole.npy wide.npy --skip-bad", "hole.npy"),
    ("bad good.npy", "1 classes, the model has 3"),
    ("nowhere good.npy", "nowhere"),
    ("empty good.npy", "no model"),
    ("resized good.npy", "--fps, --stride and --snippet"),
])  # fmt: skip
def test_what_the_command_refuses(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(["-o", "found.json", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr-detect: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("arguments, message", [
    ("model good.npy --top 0", "argument --top: '0'; give a whole number from 1"),
    ("model good.npy --top 2.5", "argument --top: '2.5'; give a whole number from 1"),
    ("model good.npy --fps 0", "argument --fps: frame rate '0'"),
    ("model good.npy --fps nan", "argument --fps: frame rate 'nan'"),
    ("model good.npy --stride -1", "argument --stride: '-1'; give a number above 0"),
    ("model good.npy --snippet inf", "argument --snippet: 'inf'; give a number above 0"),
    ("model good.npy --min-score 1.5", "argument --min-score: '1.5'; give a number from 0 to 1"),
    ("model good.npy --min-score -0.1", "argument --min-score: '-0.1'; give a number from 0 to 1"),
    ("model good.npy --min-scores 0.1", "unrecognized arguments: --min-scores 0.1; see selfdetr-detect --help"),
    ("model good.npy --device tpu", "device 'tpu'"),
    ("model good.npy --device cuda:99", "device 'cuda:99'"),
    ("model good.npy -o empty", "empty: is a folder; give the name of a file"),
    ("model good.npy -o good.npy/out.json", "good.npy is a file"),
    ("model", "the following arguments are required: features"),
    ("mdoel good.npy", "mdoel"),
    ("bad good.npy", "1 classes, the model has 3"),
    ("resized good.npy", "--fps, --stride and --snippet"),
])  # fmt: skip
def test_wrong_options_are_refused_before_any_feature_is_read(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(deploy, "open_features", lambda *_: pytest.fail("features were read"))
    before = sorted(place.rglob("*"))
    assert main(["-o", "found.json", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr-detect: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and sorted(place.rglob("*")) == before


def test_a_rate_may_be_a_fraction(made, detector, files, tmp_path):
    target = tmp_path / "found.json"
    assert main([str(made), str(files[0]), "-o", str(target), "--fps", "30000/1001", "--quiet"]) == 0
    entries = json.loads(target.read_text())["results"][files[0].stem]
    expected = detector.detect(files[0], fps=30000 / 1001)
    assert np.allclose([e["segment"] for e in entries], expected[["start", "end"]], atol=1e-5)


def test_bad_files_are_skipped_when_asked_for(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main("model wide.npy good.npy hole.npy -o found.json --skip-bad".split()) == 0
    shown = capsys.readouterr()
    assert set(json.loads(Path("found.json").read_text())["results"]) == {"good"}
    assert shown.err.count("skipped: ") == 2 and "wide.npy" in shown.err and "hole.npy" in shown.err
    assert main("resized good.npy -o found.json --fps 10 --stride 1 --snippet 1".split()) == 0


def test_missing_packages_are_named(folder, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    (folder / "model.onnx").write_bytes(b"")
    for action in (lambda: export_onnx(some_model(), folder / "x.onnx"), lambda: Detector.load(folder / "model.onnx")):
        assert "pip install 'selfdetr[onnx]'" in refused(action)
    assert not (folder / "x.onnx").exists()


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    "A model with most that is hard to export (ranked proposals, every other kind of attention), and its file."
    pytest.importorskip("onnx", reason="the packages of selfdetr[onnx] are not installed")
    pytest.importorskip("onnxscript", reason="the packages of selfdetr[onnx] are not installed")
    pytest.importorskip("onnxruntime", reason="the packages of selfdetr[onnx] are not installed")
    changes = dict(denoising=4, encoder_attention="relative")
    changes |= dict(decoder_self_attention="relational", cross_attention="deformable")
    original = Detector(some_model(**changes), detector.config)
    return original, export_onnx(original, tmp_path_factory.mktemp("onnx") / "new" / "model.onnx")


def test_an_exported_model_finds_the_same(exported, files):
    original, path = exported
    other = Detector.load(path, "cpu")
    values = np.load(files[0])
    for features in (values, values[:3], values[:32], values[:33]):  # padded, and not
        assert close(other.detect(features), original.detect(features))
    wide = {"window": 50, "batch": 1}
    assert close(other.using(**wide).detect(values), original.using(**wide).detect(values))
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "detector.json"}


def test_an_exported_file_says_nothing_of_where_it_was_made(exported):
    content = exported[1].read_bytes()
    assert b".py" not in content and str(Path.cwd()).encode() not in content


def test_an_export_that_the_system_refuses_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the packages of selfdetr[onnx] are not installed")

    def full(part, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "model.onnx").write_bytes(b"old")
    program = SimpleNamespace(model=SimpleNamespace(graph=[]), model_proto=SimpleNamespace(SerializeToString=bytes))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)  # another export would take ten seconds
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"model.onnx: cannot be written .*make room there"):
        export_onnx(some_model(), tmp_path / "model.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_exported_files_that_do_not_fit(exported, tmp_path):
    write_detector(tmp_path, replace(exported[0].config, classes=("a",)))
    (tmp_path / "model.onnx").write_bytes(exported[1].read_bytes())
    assert "1 classes, the model has 3" in refused(lambda: Detector.load(tmp_path / "model.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"cut")
    assert "model.onnx: not a network" in refused(lambda: Detector.load(tmp_path / "model.onnx"))
    write_detector(tmp_path, replace(exported[0].config, scale=np.ones((2, 5), np.float32)))
    (tmp_path / "model.onnx").write_bytes(exported[1].read_bytes())
    assert "scale in detector.json is not of 8 channels" in refused(lambda: Detector.load(tmp_path / "model.onnx"))


def test_the_command_takes_an_exported_file(exported, files, tmp_path):
    target = tmp_path / "found.json"
    assert main([str(exported[1]), str(files[0]), "-o", str(target), "--top", "5"]) == 0
    entries = json.loads(target.read_text())["results"][files[0].stem]
    frame = pd.DataFrame([(*e["segment"], e["label"], e["score"]) for e in entries])
    frame.columns = ["start", "end", "label", "score"]
    assert close(frame, exported[0].detect(files[0]).head(5))


@pytest.mark.parametrize("output", ["{features}/{name}", "{model}/config.json"])
def test_the_command_writes_over_nothing_that_it_reads(made, files, output, capsys):
    path = Path(output.format(features=files[0].parent, name=files[0].name, model=made))
    before = path.read_bytes()
    assert main([str(made), str(files[0].parent), "-o", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is read or written by this call already" in error and error.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("arguments, message", [
    ("MODEL lost.npy", "lost.npy: no such file or folder of features"),
    ("lost FEATURES", "lost: no such folder; check the path"),
    ("MODEL/config.json FEATURES", "config.json: is a file; give the folder of the model"),
])  # fmt: skip
def test_a_misspelt_path_is_named(made, files, tmp_path, capsys, arguments, message):
    given = arguments.replace("MODEL", str(made)).replace("FEATURES", str(files[0])).split()
    assert main([*given, "-o", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err
