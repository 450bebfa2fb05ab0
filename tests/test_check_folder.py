"""Everything that loading refuses is an error; windows, the time grid, and the layouts of the releases."""

import json
import math

import numpy as np
import pytest
from checking import SMALL, kinds, of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sports import annotation, edit, save, write
from test_data_dataset import SPOILED

from selfdetr import data, study
from selfdetr.check.folder import _round_to_steps, check_folder
from selfdetr.data import DataError, TimeGrid, files, load_dataset
from selfdetr.settings import choose_length
from selfdetr.study.spec import PROFILES

USUAL = {name: PROFILES["standard"]["windows"][name] for name in ("overlap", "test_overlap", "keep")}  # of `train`
TRAINED, TESTED = ({"overlap": USUAL[name], "keep": USUAL["keep"]} for name in ("overlap", "test_overlap"))

UNSEEN = {"class without train instances", "class without test instances"}  # of the few videos of the tiny data set


def test_a_clean_folder_has_no_other_finding(tiny_folder):
    findings = check_folder(tiny_folder, **SMALL)
    assert findings.ok and kinds(findings) == UNSEEN, str(findings)
    loaded = load_dataset(tiny_folder)
    assert findings.facts["channels"] == str(loaded.channels) and list(findings.classes.index) == list(loaded.classes)
    for split in ("train", "test"):
        assert findings.classes[split].sum() == len(loaded.ground_truth(split))
        assert f"{len(loaded.split(split))} videos" in findings.facts[split]
    assert findings.facts["train windows"].startswith(f"{len(data.training_windows(loaded, 64, **TRAINED))},")
    assert findings.facts["test windows"].startswith(f"{len(data.test_windows(loaded, 64, **TESTED))},")


@pytest.mark.parametrize("spoil, words", SPOILED.values(), ids=SPOILED)
def test_what_loading_refuses_is_an_error_with_its_fix(folder, spoil, words):
    spoil(folder)
    findings = check_folder(folder, **SMALL)
    errors = findings.table[findings.table.severity == "error"]
    assert not findings.ok and (findings.table.fix.str.len() > 2).all()
    said = " ".join(errors[["item", "problem", "fix"]].to_numpy().ravel().tolist())
    assert "\n" not in said and str(folder) not in said
    video = next((word for word in words if word.startswith("video ")), "")
    assert video in said or f"{video[7:-1]}.npy" in said, said


@pytest.mark.parametrize("arguments", [
    dict(train="dev"), dict(classes=["jump"]), dict(feature_format="npz"), dict(train="test"),
    dict(standardised=True, in_memory=False), dict(grid=TimeGrid(10), resize=50)])
def test_arguments_that_loading_refuses_are_errors(folder, arguments):
    with pytest.raises(DataError):
        load_dataset(folder, **arguments)
    assert not check_folder(folder, **arguments).ok


def test_an_unknown_protocol_is_an_error(folder):
    write(folder, protocol="thumos15")
    finding = of(check_folder(folder, **SMALL), "judging")
    assert finding.severity == "error" and finding.problem == "dataset.json: protocol 'thumos15' is unknown"
    assert "thumos14-212" in finding.fix
    write(folder, protocol="thumos14-212")
    assert "judging" not in kinds(check_folder(folder, **SMALL))


@pytest.mark.parametrize("change, scores, words", [
    ({"protocol": "activitynet13"}, None, "no video is in subset 'validation'"),
    ({"video_scores": "scores.json"}, "{garbage", "not valid JSON"),
    ({"video_scores": "scores.json"}, '{"results": {"d": [{"label": "run", "score": 1}]}}', "no class scores for 1"),
])  # fmt: skip
def test_what_cannot_be_judged_after_a_training_is_an_error(folder, change, scores, words):
    write(folder, **change)
    if scores:
        (folder / "scores.json").write_text(scores)
    finding = of(check_folder(folder, **SMALL), "judging")
    assert finding.severity == "error" and words in f"{finding.problem} {finding.fix}"
    with pytest.raises(DataError, match=words):
        study.open_dataset(str(folder), "smoke")


def test_it_does_not_stop_at_the_first(folder):
    def spoil(entries):
        del entries["a"]["subset"], entries["a"]["duration"]
        entries["a"]["annotations"].append(annotation("run", 5, 4))
        entries["b"]["annotations"] += [annotation("run", 5, 4), annotation("", 1, 2), annotation("Run", -1, 2)]
        entries["c"]["annotations"].append(annotation("jump", 1, 99))
        entries["d"]["annotations"] += [annotation("Jump", 1, 2), annotation("run", 3, 6)]

    edit(spoil)(folder)
    spoiled = {"stride": 1, "snippet": 1, "fsp": 3, "classes": "run", "colour": 1, "resize": 0}
    (folder / "dataset.json").write_text(json.dumps(spoiled))
    save(np.array([{}], dtype=object), "b")(folder)
    save(np.full((50, 6), np.inf, np.float32), "c")(folder)
    save(np.zeros((250, 5), np.float32), "d")(folder)
    findings = check_folder(folder, **SMALL)
    counts = findings.table[findings.table.severity == "error"].groupby("kind").size().to_dict()
    features = {"feature file": 1, "feature values": 1, "channels": 1}
    assert counts == {"settings": 4, "video entry": 2, "annotation": 4, **features}
    assert {"instance clipped", "instance duplicate", "near spellings", "all zero"} <= kinds(findings)


LEAF = st.none() | st.booleans() | st.floats(-5, 40) | st.sampled_from(["a", "run", "test", "training", math.nan, ""])
KEY = st.sampled_from(["subset", "duration", "fps", "annotations", "label", "segment", "x"])
THING = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=5), max_leaves=12)
INSTANCE = st.fixed_dictionaries({"label": THING | st.just("run"), "segment": st.tuples(LEAF, LEAF).map(list) | THING})
ENTRY = THING | st.fixed_dictionaries({
    "subset": st.sampled_from(["test", "training"]) | LEAF, "duration": st.just(30.0) | LEAF,
    "annotations": st.lists(INSTANCE | THING, max_size=4) | THING})
SETTING = st.sampled_from("stride fps classes subsets resize min_seconds prefix ignore_labels y".split())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(st.sampled_from("abcde"), ENTRY, max_size=5) | THING,
    changes=st.dictionaries(SETTING, THING, max_size=2),
    feature=THING,
)
def test_nothing_that_json_can_say_stops_it(folder, entries, changes, feature):
    content = {"database": entries, "feature": feature}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps({"stride": 1, "snippet": 1} | changes))
    findings = check_folder(folder)
    assert str(findings) and json.dumps(findings.to_dict()) and findings.markdown()
    if findings.ok:
        assert load_dataset(folder).split("train")


def test_bad_usage_is_refused_at_once(folder):
    with pytest.raises(DataError, match="no such folder"):
        check_folder(folder / "nowhere")
    with pytest.raises(DataError, match="unknown release"):
        check_folder(folder, release="thumos")
    with pytest.raises(DataError, match="'windows'.*stride"):
        check_folder(folder, windows=3)
    with pytest.raises(DataError, match="resize is 0"):
        check_folder(folder, resize=0)
    with pytest.raises(ValueError, match="keep 0"):
        check_folder(folder, keep=0)


def test_nothing_is_written(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    check_folder(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_lost_instances_are_those_of_the_windows(folder):
    edit(lambda d: d["a"]["annotations"].append(annotation("run", 2, 27)))(folder)
    loaded = load_dataset(folder)
    findings = check_folder(folder, window=96, overlap=0.75, test_overlap=0.25, keep=0.75)
    lost = data.training_windows(loaded, 96).lost
    assert lost > 0 and findings.facts["train windows"].endswith(f"without {lost} of the instances")
    cases = {finding.item: finding for finding in findings.found if finding.kind == "windows"}
    train = cases["train windows"]
    assert f"{lost} of 7 train instances" in train.problem and train.severity == "warning"
    length = int(train.fix.split("window of ")[1].split()[0])
    held = data.training_windows(loaded, length).lost + data.test_windows(loaded, length).lost
    assert held <= 0.05 * 9


def test_no_training_window_at_all_is_an_error(folder):
    findings = check_folder(folder, window=2)
    assert [f.severity for f in findings.found if f.item == "train windows"] == ["error"]


@given(start=st.floats(0, 500), steps=st.floats(0.01, 80))
def test_rounding_to_steps_is_the_best_of_all_whole_steps(start, steps):
    segment = np.array([[start, start + steps]])
    ((low, high),) = _round_to_steps(segment)
    assert (low + 0.5) % 1 == 0 and (high + 0.5) % 1 == 0 and high > low
    assert abs(low - start) <= 1 and abs(high - start - steps) <= 1


def test_short_instances(folder):
    edit(lambda d: d["a"]["annotations"].extend(annotation("run", 10 + i, 10.05 + i) for i in range(5)))(folder)
    finding = of(check_folder(folder, **SMALL), "resolution")
    assert finding.severity == "warning" and "38.5 % of 13 instances are shorter than one step" in finding.problem
    assert "4 times as many" in finding.fix


def thumos_layout(folder, names, turned):
    "The layout of the widely used release, with features simulated at the real lengths."
    source = data.find_data("thumos14")
    if source is None:
        pytest.skip("the THUMOS14 annotations are not on this machine")
    whole = files.read_json(source / "annotations.json")
    whole["database"] = {name: whole["database"][name] for name in names}
    (folder / "annotations").mkdir(parents=True)
    (folder / "i3d_features").mkdir()
    (folder / "annotations" / "thumos14.json").write_text(json.dumps(whole))
    random = np.random.default_rng(0)
    for name, entry in whole["database"].items():
        steps = (round(entry["duration"] * entry["fps"]) - 16) // 4 + 1
        array = random.standard_normal((steps, 2048), dtype=np.float32).astype(np.float16)
        np.save(folder / "i3d_features" / f"{name}.npy", array.T if turned else array)
    return folder


HANDFUL = [*(f"video_validation_000005{i}" for i in (1, 2, 3)), "video_test_0000004", "video_test_0000006"]


@pytest.mark.parametrize("turned", [False, True])
def test_the_layout_of_thumos14(tmp_path, turned):
    folder = thumos_layout(tmp_path / "thumos14", HANDFUL, turned)
    options = dict(release="thumos14", channels_first=turned)
    findings = check_folder(folder, **options)
    usual = UNSEEN | {"windows"}
    assert findings.ok and kinds(findings) <= usual, str(findings)
    assert findings.facts["channels"] == "2048" and findings.facts["stride"] == "4"
    loaded = load_dataset(folder, **options, in_memory=False)
    assert (len(loaded.split("train")), len(loaded.split("test")), loaded.channels) == (3, 2, 2048)
    windows = data.training_windows(loaded, choose_length(loaded).value, **TRAINED)
    assert findings.facts["train windows"].startswith(f"{len(windows)},")
    assert loaded.features(HANDFUL[0]).shape[0] == loaded.by_name[HANDFUL[0]].steps
    wrong = check_folder(folder, **options | {"channels_first": not turned})
    assert '"channels_first": ' + json.dumps(turned) in of(wrong, "channels first").fix


def activitynet_layout(folder, resized=None):
    "ActivityNet-1.3: names without v_ in the annotations, with it in the files; testing without annotations."
    random, entries = np.random.default_rng(0), {}
    for i in range(14):
        name, seconds = f"{random.integers(16**10):010x}_", float(random.uniform(20, 230))
        subset = ("training", "validation", "testing")[0 if i < 7 else 1 if i < 11 else 2]
        start = random.uniform(0, 0.4) * seconds
        items = [{"label": f"Playing {'polo' if i % 2 else 'harmonica'}", "segment": [start, start + 0.5 * seconds]}]
        entries[name] = {"duration": round(seconds, 2), "subset": subset, "resolution": "320x240", "url": "",
                         "annotations": [] if subset == "testing" else items}
        (folder / "i3d_features").mkdir(parents=True, exist_ok=True)
        steps = resized or round(seconds * 25 / 16)
        np.save(folder / "i3d_features" / f"v_{name}.npy", random.normal(size=(steps, 32)).astype(np.float32))
    content = {"version": "VERSION 1.3", "taxonomy": [{"nodeId": 1, "nodeName": "Playing polo"}], "database": entries}
    (folder / "activity_net.v1-3.min.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("resized", [None, 100])
def test_the_layout_of_activitynet(tmp_path, resized):
    folder = activitynet_layout(tmp_path / "anet", resized)
    findings = check_folder(folder, release="activitynet13", window=192)
    assert findings.ok and not findings.found, str(findings)
    loaded = load_dataset(folder, release="activitynet13")
    assert (len(loaded.split("train")), len(loaded.split("test"))) == (7, 4)
    assert {video.steps for video in loaded.videos} == {192} and "testing (3 videos" in findings.facts["subsets found"]


def test_activitynet_without_its_settings_is_explained(tmp_path):
    folder = activitynet_layout(tmp_path / "anet", 100)
    findings = check_folder(folder)
    assert {"annotation file", "annotations elsewhere", "feature folder"} == kinds(findings)
    more = dict(annotations="activity_net.v1-3.min.json", features="i3d_features")
    assert '"prefix": "v_"' in check_folder(folder, **more).table.query("kind == 'missing features'").fix.iloc[0]
    more |= dict(prefix="v_", fps=25.0, stride=16, snippet=16)
    assert '"resize": 100' in of(check_folder(folder, **more), "time grid").fix
    assert check_folder(folder, resize=100, window=100, **more).ok
