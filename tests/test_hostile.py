"""Files that mean harm: nothing comes out of a reader but DataError, soon, and nothing leads out of a folder."""

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from selfdetr import check, data, evaluation, inference, model, simulate, study, video
from selfdetr.data import DataError, load_dataset

sys.path.insert(0, str(Path(__file__).parent))  # where the fuzzer is, however pytest was started
import fuzz_readers as fuzz  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_waiting():
    "A reader that waits for a pipe fails its test."
    before = signal.signal(signal.SIGALRM, fuzz.stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path):
    fuzz.write_valid(tmp_path / "set")
    return tmp_path / "set"


def refused(read, *words):
    "The message of the refusal, which has all the words, is short and in one line."
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert fuzz.poor_message(message) == "" and len(message) < 1000
    assert [word for word in words if word not in message] == [], message
    return message


def change(path, *keys_and_value):
    "A valid JSON file with another value in one place."
    *keys, last, value = keys_and_value
    content = part = json.loads(path.read_text())
    for key in keys:
        part = part[key]
    part[last] = value
    path.write_text(fuzz.dump(content))


# ---- the fuzzer


@pytest.fixture(scope="module")
def fuzzer():
    before = study.source_hash
    with tempfile.TemporaryDirectory() as root:
        yield fuzz.Fuzzer(Path(root))
    study.source_hash = before


def test_two_thousand_mutated_files_give_data_errors_only(fuzzer):
    before = fuzz.peak_megabytes()
    fuzzer.run(2000, seed=7)
    assert [(name, wrong) for name, _, wrong in fuzzer.failures] == []
    counts = fuzzer.counts
    assert counts.refused.sum() > 1000 and counts.accepted.sum() > 100  # both happen, so both are tested
    assert fuzz.peak_megabytes() - before < 512


def test_the_fuzzer_sees_what_is_wrong(fuzzer, monkeypatch):
    def fails(error):
        def read(_):
            raise error

        return fuzz.Reader("annotations.json", fuzz.mutate_json, read, 1)

    def endless(_):
        while True:
            pass

    cases = {
        "type": fails(TypeError("x")),
        "value": fails(ValueError("x")),
        "memory": fails(MemoryError()),
        "long": fails(DataError("x" * 9999)),
        "lines": fails(DataError("a\nb")),
        "none": fails(DataError("")),
    }
    cases["slow"] = fuzz.Reader("annotations.json", fuzz.mutate_json, endless, 1)
    monkeypatch.setattr(fuzz, "READERS", cases)
    monkeypatch.setattr(fuzzer, "folders", dict.fromkeys(cases, next(iter(fuzzer.folders.values()))))
    monkeypatch.setattr(fuzzer, "failures", [])
    monkeypatch.setattr(fuzzer, "seconds", 0.05)
    before = signal.signal(signal.SIGPROF, fuzz.stop)
    try:
        assert {name: bool(fuzzer.send(name, b"{}")) for name in cases} == dict.fromkeys(cases, True)
    finally:
        signal.signal(signal.SIGPROF, before)
    assert [name for name, *_ in fuzzer.failures] == list(cases)


# ---- JSON


DEEP = "[" * 100_000
TEXTS = {
    "cut short": '{"database": {"a"',
    "deep and open": DEEP,
    "deep": DEEP + "]" * 100_000,
    "half deep": '{"a":' * 50 + "1" + "}" * 50,
    "many digits": '{"database": {"a": {"duration": ' + "1" * 5000 + "}}}",
    "no object": "[1]",
    "half a character": '{"a": "\\ud800"}',
    "raw NUL": '{"a": "\0"}',
    "twice": '{"a": 1, "a": 2}',
    "empty": "",
    "a word": "nul",
    "comment": "{} // x",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("read", [
    data.read_json, data.read_annotations, evaluation.read_ground_truth, evaluation.read_detections,
    evaluation.read_durations, inference.read_video_scores, study.read_table,
    lambda path: study.RunSpec.from_json(path.read_text())])  # fmt: skip
def test_broken_json_is_refused_by_every_reader(tmp_path, text, read):
    path = tmp_path / "file.json"
    path.write_text(text)
    refused(lambda: read(path))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\0}\0", b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\x80", b'{"a": "\xed\xa0\x80"}']
)
def test_bytes_that_are_no_utf8_are_refused(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    refused(lambda: data.read_json(path), "file.json")


def test_one_byte_order_mark_is_read_over(folder):
    path = folder / "annotations.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(data.read_annotations(path).videos) == 3


PLACES = ["annotations.json", "dataset.json", "features/a.npy", "features/c.npy"]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_and_never_waited_for(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    refused(lambda: load_dataset(folder), path.name, "pipe or a device" if kind != "folder" else ";")


def test_pipes_of_other_files_are_refused_too(folder):
    for name in (
        "run/config.json",
        "run/checkpoint.safetensors",
        "run/detector.json",
        "run/spec.json",
        "run/history.csv",
        "here/table9.json",
        "table.csv",
        "videos.json",
    ):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    for read in (
        lambda: inference.read_detector(folder / "run"),
        lambda: model.load_model(folder / "run"),
        lambda: study.read_run(folder / "run"),
        lambda: study.read_table(folder / "here/table9.json"),
        lambda: check.import_segments(folder / "table.csv", folder / "new"),
        lambda: video.read_entries(folder),
    ):
        refused(read, "pipe or a device")


def test_a_text_has_a_largest_size(folder, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_TEXT", 100)
    refused(lambda: data.read_annotations(folder), "annotations.json", "LARGEST_TEXT")
    refused(lambda: check.import_segments(folder / "table.csv", folder / "new"), "table.csv", "LARGEST_TEXT")


# ---- values of every wrong kind


WRONG = [
    None,
    True,
    "1",
    "",
    [],
    {},
    [1],
    float("nan"),
    float("inf"),
    -1,
    10**400,
    1e300,
    fuzz.Raw("1e999"),
    {"a": [1]},
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("keys", [("duration",), ("annotations", 0, "segment", 1), ("annotations", 0, "segment")])
def test_values_of_annotations(folder, keys, value):
    change(folder / "annotations.json", "database", "a", *keys, value)
    refused(lambda: data.read_annotations(folder), "annotations.json: video 'a'", ";")
    path = folder / "annotations.json"
    refused(lambda: simulate.make_dataset(folder / "made", annotations=path), "annotations.json: video a", ";")


@pytest.mark.parametrize("value", [{}, 3, None, []], ids=repr)
def test_entries_of_annotations(folder, value):
    path = folder / "annotations.json"
    change(path, "database", "a", value)
    refused(lambda: data.read_annotations(folder), "annotations.json: video 'a'", ";")
    refused(lambda: simulate.make_dataset(folder / "made", annotations=path), "annotations.json: video a", ";")


@pytest.mark.parametrize("value", [None, []], ids=repr)
def test_simulated_recordings_may_have_no_annotations(folder, value):
    change(folder / "annotations.json", "database", "a", "annotations", value)
    made = simulate.make_dataset(folder / "made", annotations=folder / "annotations.json")
    assert json.loads((made / "annotations.json").read_text())["database"]["a"]["annotations"] == []


@pytest.mark.parametrize("value", [None, True, 1, "", [], ["run"], {}, "a" * 1001, "two\nlines", "\x1b[2J"], ids=repr)
def test_labels_of_annotations(folder, value):
    change(folder / "annotations.json", "database", "a", "annotations", 0, "label", value)
    refused(lambda: data.read_annotations(folder), "annotations.json: video 'a', annotation 0", "; write")


@pytest.mark.parametrize("key", [key for key in data.SETTINGS if key not in ("description", "protocol")])
@pytest.mark.parametrize("value", [None, [1], [None], {"train": [1]}, 10**400, float("nan"), [["a"]]], ids=repr)
def test_values_of_settings(folder, key, value):
    change(folder / "dataset.json", key, value)
    refused(lambda: load_dataset(folder), "dataset.json", key)
    assert not check.check_folder(folder, window=16).ok


@pytest.mark.parametrize("value", [[None], [{}], [[1, 2]], "ab", {"a": 1},
                                   [{"label": "a", "segment": "12", "score": 1}],
                                   [{"label": [1], "segment": [1, 2], "score": 1}],
                                   [{"label": "a", "segment": [1, 10**400], "score": 1}],
                                   [{"label": "a", "segment": [[1], [2]], "score": 1}],
                                   [{"label": "a", "segment": [1, 1e300], "score": 1}],
                                   [{"label": "a", "segment": [1, 2], "score": 10**400}],
                                   [{"label": "a", "segment": [1, 2], "score": {}}]], ids=repr)  # fmt: skip
def test_values_of_results(folder, value):
    change(folder / "results.json", "results", "a", value)
    refused(lambda: evaluation.read_detections(folder / "results.json"), "a")


# ---- names that lead out


OUTSIDE = [
    "..",
    "../x",
    "a/../../x",
    "/etc/x",
    "C:\\x",
    "C:x",
    "..\\x",
    "\\\\host\\x",
    "a/..",
    "a\nb",
    "a" * 300,
    "a/" * 2000,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:12])
def test_no_name_of_a_video_leads_out(folder, tmp_path, name):
    content = json.loads((folder / "annotations.json").read_text())
    content["database"][name] = content["database"].pop("a")
    (folder / "annotations.json").write_text(json.dumps(content))
    refused(lambda: load_dataset(folder), "annotations.json", "no name inside the folder")
    findings = check.check_folder(folder, window=16)
    assert [row.mend[:5] for row in findings.found if row.kind == "video name"] == ["write"]
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: simulate.make_dataset(tmp_path / "made", annotations=folder / "annotations.json"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", data.PLACES)
@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:12])
def test_no_setting_leads_out(folder, key, name):
    change(folder / "dataset.json", key, name)
    refused(lambda: load_dataset(folder), f"dataset.json: {key}", "no name inside the folder")
    if key == "annotations":  # where the import writes
        refused(lambda: check.import_segments(folder / "table.csv", folder, force=True), "no name inside the folder")


def test_prefix_and_name_do_not_lead_out_together(folder):
    refused(lambda: data.FeatureFiles(folder, prefix="a/.").path("./../x"), "no name inside the folder")
    refused(lambda: load_dataset(folder, prefix="../features/"), "no name inside the folder")


def test_a_table_names_no_file_elsewhere(folder):
    rows = (folder / "table.csv").read_text()
    (folder / "table.csv").write_text(rows.replace("a.mp4", "../../elsewhere/a.mp4"))
    written = check.import_segments(folder / "table.csv", folder / "new")
    assert sorted(json.loads(written.path.read_text())["database"]) == [
        "a",
        "b",
        "c",
    ]  # names of files, without folders
    (folder / "table.csv").write_text(rows.replace("a.mp4", "x/.."))
    refused(lambda: check.import_segments(folder / "table.csv", folder / "two"), "table.csv, line 2", "no name inside")
    assert not (folder / "two").exists()


def test_links_are_followed_and_a_call_may_name_any_folder(folder, tmp_path):
    (folder / "features").rename(tmp_path / "disk")
    assert len(load_dataset(folder, features=str(tmp_path / "disk")).videos) == 3
    (folder / "features").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "a.npy").rename(tmp_path / "cached")
    (tmp_path / "disk" / "a.npy").symlink_to(tmp_path / "cached")
    assert len(load_dataset(folder).videos) == 3


# ---- arrays


VALUES = np.arange(80, dtype=np.float32).reshape(20, 4)


@pytest.mark.parametrize(
    "array", [VALUES.astype(">f4"), np.asfortranarray(VALUES), VALUES.astype("<f8"), VALUES.astype("<i2")]
)
def test_arrays_of_other_layouts_are_read_as_what_they_are(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", array)
    for name in ("a.npy", "a.npz"):
        assert np.array_equal(data.read_features(tmp_path / name), VALUES)


def header(path, shape, kind="<f4", size=320):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        file.write(bytes(size))


@pytest.mark.parametrize(
    "shape", [(10**12, 4), (2**62, 2**62), (-5, -16), (2**63, 4), (80,), (), (2, 10, 4), (10**18, 0)], ids=repr
)
def test_shapes_that_the_file_does_not_have(tmp_path, shape):
    header(tmp_path / "a.npy", shape)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.write(tmp_path / "a.npy", "a.npy")
    for name in ("a.npy", "a.npz"):
        refused(lambda name=name: data.check_features(data.read_features(tmp_path / name), name), name)


@pytest.mark.parametrize(
    "kind", ["|O", "|V16", "<U4", "<M8[s]", "<c8", "|b1", "|V0", [("a", "<f4"), ("b", "<f4")], [("a", "|O")]], ids=repr
)
def test_kinds_that_are_no_numbers(tmp_path, kind):
    header(tmp_path / "a.npy", (5, 4), kind)
    refused(lambda: data.check_features(data.read_features(tmp_path / "a.npy"), "a.npy"), "a.npy")


def test_an_archive_that_claims_more_than_it_may(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((1000, 100)))
    torch.save(torch.zeros(1000, 100), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    assert data.read_features(tmp_path / "a.npz").shape == data.read_features(tmp_path / "a.pt").shape == (1000, 100)
    monkeypatch.setattr(data, "LARGEST_UNPACKED", 100_000)
    for name in ("a.npz", "a.pt"):
        refused(lambda name=name: data.read_features(tmp_path / name), "video 'a'", "would unpack to")


# ---- more than there is


def unresized(folder):
    "Without the number of steps that every recording is brought to."
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"resize": 32, ', ""))


def test_what_does_not_fit_in_memory_is_refused_before_values_are_read(folder, monkeypatch):
    unresized(folder)
    looked_at, look = [], data.check_features
    monkeypatch.setattr(data, "check_features", lambda *given: (looked_at.append(given), look(*given)))
    monkeypatch.setattr(data, "memory_there", lambda: 4 * 40 * 4 * 4)  # of four recordings, and the largest is copied
    assert load_dataset(folder).array.shape == (3 * 40 + 1, 4) and len(looked_at) == 3
    monkeypatch.setattr(data, "memory_there", lambda: 4 * 40 * 4 * 4 - 1)
    refused(lambda: load_dataset(folder), "features", '"in_memory": false', "more memory than there is")
    assert len(looked_at) == 3 and len(load_dataset(folder, in_memory=False).videos) == 3
    monkeypatch.setattr(data, "memory_there", lambda: 4 * 40 * 4 * 2)
    with np.load(folder / "features" / "a.npz") as values:
        for name in "bc":
            np.savez_compressed(folder / "features" / f"{name}.npz", values["features"])
    refused(lambda: load_dataset(folder, feature_format="npz"), '"in_memory": false')


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no limit of the address space holds")
def test_a_sparse_file_under_a_limit_of_memory_is_a_data_error(folder):
    np.lib.format.open_memmap(folder / "features" / "b.npy", "w+", np.float16, (250_000_000, 4))
    unresized(folder)
    script = f"""
import resource
from selfdetr import data
data.check_features = lambda *_: print("values are read")
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))
try:
    data.load_dataset({str(folder)!r})
except data.DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and '"in_memory": false' in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind, words", [("npz", "every window will unpack its whole .npz file"), ("npy", None)])
def test_mapping_what_cannot_be_mapped_is_a_warning(folder, kind, words):
    unresized(folder)
    for name in "bc":
        np.savez(folder / "features" / f"{name}.npz", features=np.load(folder / "features" / f"{name}.npy"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dataset(folder, in_memory=False, feature_format=kind)
    assert [str(one.message).split(", and ")[1].split(";")[0] for one in caught] == ([words] if words else [])
    found = check.check_folder(folder, window=16, in_memory=False, feature_format=kind)
    assert [row.what for row in found.found if "in_memory" in row.what] == (
        ["in_memory is false, and every window unpacks its whole .npz file"] if words else [])


@pytest.mark.parametrize("key", ["\x1b[2J", "a\nb", "k" * 5000, "'; x='", "{file}", "\u202egpj"],
                         ids=lambda key: ascii(key)[:12])
def test_names_of_arrays_are_shown_in_one_short_line(tmp_path, key):
    torch.save({key: torch.zeros(2, 2)} | {f"{i}": torch.zeros(1) for i in range(2000)}, tmp_path / "a.pt")
    refused(lambda: data.read_features(tmp_path / "a.pt"), "a dict", "save one array", ", ...")
    np.savez(tmp_path / "a.npz", **{"x": np.zeros((2, 2)), key.replace("\n", " "): np.zeros((2, 2))})
    refused(lambda: data.read_features(tmp_path / "a.npz"), "'x'", "save one array")


def test_many_names_in_another_unicode_form_take_little_time(folder):
    names = [f"\u00fc{i}" for i in range(2000)]
    for name in names:
        (folder / "features" / f"{name}x.npy").touch()
    started = time.process_time()
    assert not any(data.FeatureFiles(folder / "features").path(name).exists() for name in names[:100])
    assert time.process_time() - started < 5
    items = {"a": [{"label": f"\u00fc{i}", "segment": [0, 1]} for i in range(20_000)]}
    assert data.labels_in_one_form(items, [], {}) == items and time.process_time() - started < 5


@pytest.mark.parametrize("key", ["duration", "subset", "annotations"])
def test_an_entry_of_many_other_keys_is_refused_soon(folder, key):
    change(folder / "annotations.json", "database", "a", {f"{key}_{i}" + "x" * 40: [1] for i in range(20_000)})
    refused(lambda: data.read_annotations(folder), "video 'a'")


class Harm:
    "Runs code when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path):
    harm = Harm(tmp_path / "harm")
    np.save(tmp_path / "a.npy", np.array([[harm]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([[harm]], dtype=object))
    torch.save(harm, tmp_path / "a.pt")
    torch.save(harm, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(harm))
    for name in ("a.npy", "a.npz", "a.pt", "b.pt", "c.npy"):
        refused(lambda name=name: data.read_features(tmp_path / name), "never loaded")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harm))  # it would have shown
    assert (tmp_path / "harm").is_dir()


# ---- models and runs


def only_on_meta(config, make_model=model.make_model):
    assert torch.empty(0).device.type == "meta", "a model was made that takes memory"
    return make_model(config)


@pytest.mark.parametrize("key, value", [
    ("dim", 10**12), ("dim", 16), ("channels", 10**9), ("hidden", 10**9), ("queries", 10**9), ("classes", 10**9),
    ("decoder_layers", 10**9), ("encoder_layers", 10**9), ("encoder_layers", 0), ("dim", "8"), ("dim", 8.5),
    ("heads", True), ("dropout", 1e999), ("maps", ["before"]), ("denoising", 10**12), ("norm_groups", 0),
    ("width", 1)])  # fmt: skip
def test_a_model_is_made_only_in_the_size_of_its_weights(folder, monkeypatch, key, value):
    change(folder / "run" / "config.json", key, value)
    monkeypatch.setattr(model, "make_model", only_on_meta)
    refused(lambda: model.load_model(folder / "run"), "run/")


@pytest.mark.parametrize("part, key, value", [
    ("inference", "window", 10**9), ("inference", "window", "16"), ("inference", "nms", []), ("inference", "speed", 1),
    ("grid", "fps", 0), ("grid", "fps", True), ("grid", "hop", 1), ("scale", "mean", [1e999] * 4),
    ("scale", "deviation", [0] * 4), ("scale", "mean", "abcd"), ("scale", "mean", [1]), ("classes", 0, 7),
    ("classes", 0, "a\nb")])  # fmt: skip
def test_values_of_a_detector(folder, part, key, value):
    change(folder / "run" / "detector.json", part, key, value)
    refused(lambda: inference.read_detector(folder / "run"), "detector.json")


@pytest.mark.parametrize("key, value", [("resize", 10**12), ("resize", True), ("fps_varies", 1), ("classes", "ab"),
                                        ("scale", 3), ("grid", None), ("inference", [])])  # fmt: skip
def test_parts_of_a_detector(folder, key, value):
    change(folder / "run" / "detector.json", key, value)
    refused(lambda: inference.read_detector(folder / "run"), "detector.json")


@pytest.mark.parametrize("keys, value", [
    (["seed"], "0"), (["seed"], 10**30), (["seed"], None), (["dataset"], ["a"]), (["profile"], 3), (["model"], None),
    (["model", "dim"], "64"), (["train", "milestones"], [[1]]), (["train", "milestones"], 3), (["loss", "l1"], 10**400),
    (["inference", "window"], 10**12), (["feedback", "kl"], {}), (["more"], 1)])  # fmt: skip
def test_values_of_a_spec(folder, keys, value):
    change(folder / "run" / "spec.json", *keys, value)
    refused(lambda: study.read_run(folder / "run"), "spec.json")


@pytest.mark.parametrize("key, value", [
    ("epochs", "2"), ("epochs", 3), ("average", None), ("seconds_train", {}), ("source", 1), ("mAP", 3), ("mAP", {}),
    ("mAP", {"0.5": "x"}), ("test_instances", None), ("protocol", None), ("diversity", [3]),
    ("diversity", [{"part": "decoder"}])])  # fmt: skip
def test_values_of_metrics(folder, key, value):
    change(folder / "run" / "metrics.json", key, value)
    refused(lambda: study.read_run(folder / "run"), "history.csv" if (key, value) == ("epochs", 3) else "metrics.json")


@pytest.mark.parametrize("keys, value", [(["claims"], {}), (["claims", 0], 3), (["claims", 0, "text"], 3),
                                         (["title"], None), (["rows"], 1), (["seeds"], "ab")])  # fmt: skip
def test_values_of_a_table(folder, keys, value):
    change(folder / "here" / "table9.json", *keys, value)
    refused(lambda: study.write_claims(folder), "table9.json", "run its notebook again")


# ---- the code


def calls(path):
    "Name, keywords and line of every call in a module or a notebook; names as they are written."
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        texts = [re.sub(r"^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M) for cell in cells]
    else:
        texts = [path.read_text()]
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                yield ast.unparse(node.func), given
            if isinstance(node, ast.Import):
                yield from ((f"import {a.name}", {}) for a in node.names)
                yield from ((f"import {a.name} as {a.asname}", {}) for a in node.names if a.asname)
            if isinstance(node, ast.ImportFrom):
                yield f"import {node.module}", {}
                yield from ((f"from {node.module} import {a.name}", {}) for a in node.names)


UNPICKLING = {"pd.read_pickle", "pandas.read_pickle", "joblib.load", "pickle.load", "torch.jit.load", "yaml.load"}
MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "yaml")
RUNNING = {"eval", "exec"} | {f"import {name}" for name in MODULES}
LOADING = {"torch": ("load", "jit", "hub"), "numpy": ("load",), "pandas": ("read_pickle",), "joblib": ("load",)}
HIDDEN = {f"from {module} import {name}" for module, names in LOADING.items() for name in names}
USUAL = {"import numpy as np", "import pandas as pd"}  # by other names their calls would not be seen


def unsafe(path, package):
    "Calls that might run what is in a file. NumPy does not unless it is told to; the package says so all the same."
    for name, given in calls(path):
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", package) is not False:
            yield f"{name} without allow_pickle=False"
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"{name} without weights_only=True"
        renamed = re.match(r"import (numpy|pandas|torch|joblib) as ", name) and name not in USUAL
        if name in UNPICKLING | HIDDEN or renamed or package and name in RUNNING:
            yield name


def test_nothing_is_unpickled_anywhere():
    found = {}
    for pattern in ("selfdetr/*.py", "nbs/*.ipynb", "tests/*.py", "benchmarks/*.py", "docs/*.py"):
        paths = sorted(ROOT.glob(pattern))
        assert paths
        found |= {path.name: bad for path in paths if (bad := list(unsafe(path, pattern.startswith("selfdetr"))))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "torch.load(p)",
        "eval(x)",
        "import pickle",
        "torch.load(p, weights_only=False)",
        "from pickle import loads",
        "pd.read_pickle(p)",
        "import pickle as p",
        "from torch import load",
        "from torch import load as read",
        "from numpy import load",
        "import torch as t",
        "from joblib import load",
        "from torch import hub",
    ],
)
def test_what_unpickles_would_be_found(tmp_path, text):
    (tmp_path / "a.py").write_text(text)
    assert list(unsafe(tmp_path / "a.py", package=True))


@pytest.mark.parametrize("kind", ["<U0", "|S0", "|V0"])
@pytest.mark.parametrize("version", [1, 2])
def test_values_without_size_do_not_end_the_process(tmp_path, kind, version):
    "NumPy divides by the size when it maps a file: found by the fuzzer, as a process that was gone."
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (3, 2), }}\n".encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(64))
    refused(lambda: data.read_features(tmp_path / "a.npy"), "have no size")
