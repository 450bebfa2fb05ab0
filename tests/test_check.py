"""The contracts of selfdetr.check: every fault is found beside every other, named and mended; segments from tables."""

import difflib
import gzip
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import COMPOSED, DECOMPOSED, SEVERAL, SPOILED, annotation, database, edit, save, write

from selfdetr import check, data
from selfdetr.check import Findings, check_folder, import_segments, main
from selfdetr.data import DataError, TimeGrid, load_dataset

SMALL = dict(window=64)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "sports")


def kinds(findings):
    return set(findings.table.kind)


def of(findings, kind):
    "The only finding of a kind."
    (case,) = [finding for finding in findings.found if finding.kind == kind]
    return case


# Everything that loading refuses is an error, in one go.


def test_a_clean_folder_has_no_finding(tiny_folder):
    findings = check_folder(tiny_folder, **SMALL)
    assert findings.ok and kinds(findings) == {"class without test instances"}, str(findings)  # action 1, indeed
    loaded = load_dataset(tiny_folder)
    assert findings.known["channels"] == str(loaded.channels) and list(findings.classes.index) == list(loaded.classes)
    for split in ("train", "test"):
        assert findings.classes[split].sum() == len(loaded.ground_truth(split))
        assert f"{len(loaded.split(split))} videos" in findings.known[split]
    assert findings.known["train windows"].startswith(f"{len(data.training_windows(loaded, 64))},")
    assert findings.known["test windows"].startswith(f"{len(data.test_windows(loaded, 64))},")


@pytest.mark.parametrize("spoil, words", SPOILED.values(), ids=SPOILED)
def test_what_loading_refuses_is_an_error_with_its_mend(folder, spoil, words):
    spoil(folder)
    findings = check_folder(folder, **SMALL)
    errors = findings.table[findings.table.severity == "error"]
    assert not findings.ok and (findings.table.mend.str.len() > 2).all()
    said = " ".join(errors[["item", "what", "mend"]].to_numpy().ravel().tolist())
    assert "\n" not in said and str(folder) not in said
    video = next((word for word in words if word.startswith("video ")), "")
    assert video in said or f"{video[7:-1]}.npy" in said, said


@pytest.mark.parametrize("arguments", [
    dict(train="dev"), dict(classes=["jump"]), dict(feature_format="npz"), dict(train="test"), dict(resize=0),
    dict(standardised=True, in_memory=False), dict(grid=TimeGrid(10), resize=50)])
def test_arguments_that_loading_refuses_are_errors(folder, arguments):
    with pytest.raises(DataError):
        load_dataset(folder, **arguments)
    assert not check_folder(folder, **arguments).ok


def test_an_unknown_protocol_is_an_error(folder):
    write(folder, protocol="thumos15")
    finding = of(check_folder(folder, **SMALL), "settings")
    assert (finding.severity, finding.item) == ("error", "dataset.json")
    assert "'thumos15'" in finding.what and "thumos14-212" in finding.mend
    write(folder, protocol="thumos14-212")
    assert "settings" not in kinds(check_folder(folder, **SMALL))


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(TypeError, match="'windows'.*stride"):
        check_folder(folder, windows=3)
    with pytest.raises(DataError, match="keep is 0"):
        check_folder(folder, keep=0)


def test_nothing_is_written(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    check_folder(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


# Names of files.


def rename(folder, change):
    for path in list((folder / "features").iterdir()):
        path.rename(change(path))


RENAMED = [
    (lambda p: p.with_name(f"v_{p.name}"), ["v_a.npy", '"prefix": "v_"']),
    (lambda p: p.with_name(p.name.replace(".npy", "_rgb.npy")), ["a_rgb.npy", "'_rgb'", "files' names"]),
    (lambda p: p.with_suffix(".npz"), ["a.npz", '"feature_format": "npz"']),
    (lambda p: p.with_suffix(".pt"), ["a.pt", '"feature_format": "pt"']),
    (lambda p: p.with_suffix(".pkl"), ["a.pkl", "numpy.save"]),
    (lambda p: p.with_name(p.name.upper()), ["A.NPY", "case"]),
    (lambda p: p.with_name(f"v_{p.stem}.pt"), ["v_a.pt", '"prefix": "v_"', '"feature_format": "pt"']),
]


@pytest.mark.parametrize("change, words", RENAMED)
def test_names_that_differ_are_explained(folder, change, words):
    rename(folder, change)
    findings = check_folder(folder)
    missing = findings.table[findings.table.kind == "missing features"]
    assert len(missing) == 5 and set(missing.severity) == {"error"} and "extra features" not in kinds(findings)
    first = missing.iloc[0]
    said = f"{first.what} {first.mend}"
    assert [word for word in ["a.npy is not there", *words] if word not in said] == [], said


@pytest.mark.parametrize("written, there", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_file_in_another_unicode_form_is_a_note(folder, written, there):
    edit(lambda d: d.update({written: d.pop("b")}))(folder)
    path = folder / "features" / "b.npy"
    path = path.rename(path.with_stem(there))
    findings = check_folder(folder)
    assert findings.ok and not {"missing features", "extra features"} & kinds(findings)
    finding = of(findings, "other form")
    assert finding.severity == "note" and ascii(written) in finding.what and ascii(f"{there}.npy") in finding.what
    path.rename(path.with_stem(f"v_{there}"))
    (missing,) = [finding for finding in check_folder(folder).found if finding.kind == "missing features"]
    assert f"v_{there}.npy is" in missing.what and '"prefix": "v_"' in missing.mend


def test_one_file_for_two_videos_is_an_error(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b"), DECOMPOSED: d.pop("c")}))(folder)
    save(np.ones((200, 6), np.float32), COMPOSED)(folder)
    finding = of(check_folder(folder), "feature file")
    assert ascii(COMPOSED) in finding.what and ascii(DECOMPOSED) in finding.what and "one name" in finding.mend


def test_a_file_for_the_folder_of_features(folder):
    finding = of(check_folder(folder, features="features/a.npy"), "feature folder")
    assert finding.what == "is a file" and '"features": "features"' in finding.mend


def test_the_mend_for_a_prefix_works(folder):
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    findings = check_folder(folder, prefix="v_")
    assert findings.ok and "missing features" not in kinds(findings)
    assert load_dataset(folder, prefix="v_").hash() == load_dataset(write(folder.with_name("other"))).hash()


def test_files_under_another_name_are_looked_through(folder):
    SPOILED["NaN"][0](folder)
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    assert of(check_folder(folder), "feature values").item == "features/v_b.npy"


def test_a_name_with_a_folder_leads_to_its_file(folder):
    edit(lambda d: d.update({"part/b": d.pop("b")}))(folder)
    (folder / "features" / "part").mkdir()
    (folder / "features" / "b.npy").rename(folder / "features" / "part" / "b.npy")
    findings = check_folder(folder)
    assert findings.ok and "missing features" not in kinds(findings) and "part/b" in load_dataset(folder).by_name


def test_a_few_missing_and_extra_files(folder):
    (folder / "features" / "b.npy").rename(folder / "features" / "spare.npy")
    findings = check_folder(folder)
    assert findings.ok and of(findings, "missing features").severity == "warning"
    assert "tried other endings" in of(findings, "missing features").what
    assert of(findings, "extra features").item == "features/spare.npy"


def test_short_names_do_not_match_everything():
    files = [data.Path(f"recording_{i}.npy") for i in range(40)]
    place = check.places(data.Path("x"), data.DEFAULTS)
    assert check.explain_names(["1"], [*files, data.Path("other.npy")], place)["1"][0].name == "recording_1.npy"
    assert check.explain_names([f"video_{i}" for i in range(40, 60)], files, place) == {}


def test_another_feature_folder_is_named(folder):
    (folder / "features").rename(folder / "i3d_features")
    finding = of(check_folder(folder), "feature folder")
    assert '"features": "i3d_features"' in finding.mend
    assert check_folder(folder, features="i3d_features").ok


# Annotations in another layout.

ITEM = {"video": "a", "segment": [1, 2], "label": "run"}
FOREIGN = {
    "plain list": ([ITEM, ITEM], ["list of 2 entries", "video, segment, label", "selfdetr-data import"]),
    "database as a list": ({"database": [ITEM]}, ['list under "database"', "write"]),
    "empty database": ({"database": {}}, ["without videos"]),
    "videos": ({"videos": {"a": {"subset": "training"}}}, ['under "videos"', '"database"']),
    "COCO": ({"images": [], "annotations": [], "categories": []}, ["COCO", "category"]),
    "captions": ({"v_a": {"duration": 3, "timestamps": [[0, 1]], "sentences": ["x"]}}, ["captions", "class"]),
    "results": ({"version": "1", "results": {"a": []}}, ["detections", "selfdetr-eval"]),
    "no database": (database(), ['without the "database"', "around"]),
    "MultiTHUMOS": ({"a": {"subset": "testing", "duration": 3, "actions": [[3, 1, 2]]}}, ["MultiTHUMOS", "class"]),
    "lists by video": ({"a": [[1, 2, "run"]]}, ["list of segments", "selfdetr-data import"]),
}


@pytest.mark.parametrize("content, words", FOREIGN.values(), ids=FOREIGN)
def test_other_layouts_are_recognised(folder, content, words):
    (folder / "annotations.json").write_text(json.dumps(content))
    findings = check_folder(folder)
    finding = of(findings, "annotation layout")
    said = f"{finding.what} {finding.mend}"
    assert finding.severity == "error" and [word for word in words if word not in said] == [], said
    assert main(["check", str(folder)]) == 2


def test_features_are_checked_without_annotations(folder):
    (folder / "annotations.json").write_text("[]")
    save(np.full((9, 6), np.nan, np.float32), "b")(folder)
    assert {"annotation layout", "feature values"} <= kinds(check_folder(folder))


def test_what_lies_beside_a_missing_annotation_file(folder):
    (folder / "annotations").mkdir()
    (folder / "annotations.json").rename(folder / "annotations" / "thumos14.json")
    (folder / "annotations" / "BasketballDunk_val.txt").write_text("video_validation_0000001  12.3 45.6\n")
    (folder / "segments.tsv").write_text("video\tstart\tend\tlabel\n")
    (folder / "readme.txt").write_text("not a table of segments\n")
    findings = check_folder(folder)
    items = {finding.item: finding for finding in findings.found if finding.kind == "annotations elsewhere"}
    assert set(items) == {"annotations/thumos14.json", "annotations/BasketballDunk_val.txt", "segments.tsv"}
    assert '"annotations": "annotations/thumos14.json"' in items["annotations/thumos14.json"].mend
    assert "import segments.tsv" in items["segments.tsv"].mend
    assert check_folder(folder, annotations="annotations/thumos14.json").ok


def test_names_listed_twice_are_all_named_and_the_rest_is_checked(folder):
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"c": {', '"b": {').replace('"e": {', '"d": {'))
    findings = check_folder(folder)
    twice = findings.table[findings.table.kind == "listed twice"]
    assert len(twice) == 2 and "test (1 videos" in findings.known["subsets found"]


# Instances, labels and subsets.


def test_odd_instances_are_warnings_with_their_video(folder):
    odd = [("run", 29, 31), ("jump", 31, 33), ("run", 1, 3), ("run", 1.05, 3), ("jump", 1.05, 3), ("Ambiguous", 4, 5),
           ("run", 10, 10.01)]
    edit(lambda d: d["a"]["annotations"].extend(annotation(*row) for row in odd))(folder)
    findings = check_folder(folder, min_seconds=0.02, **SMALL)
    found = {finding.kind: finding for finding in findings.found if finding.item == "video 'a'"}
    of_instances = {f"instance {kind}" for kind in ("clipped", "beyond", "duplicate", "ignored", "short")}
    assert set(found) == of_instances | {"near duplicates"}
    assert findings.ok and "0.97" in found["near duplicates"].what and found["instance ignored"].severity == "note"


def test_an_instance_of_no_length_is_a_warning(folder):
    edit(lambda d: d["a"]["annotations"].append(annotation("run", 0, 0)))(folder)
    findings = check_folder(folder)
    finding = of(findings, "instance no length")
    assert findings.ok and (finding.severity, finding.item) == ("warning", "video 'a'") and "run 0-0 s" in finding.what


@pytest.mark.parametrize("options, kept", [({}, COMPOSED), (dict(classes=["run", "jump", DECOMPOSED]), DECOMPOSED)])
def test_a_label_in_two_unicode_forms_is_one_class_and_a_note(folder, options, kept):
    odd = [annotation(COMPOSED, 8, 9), annotation(DECOMPOSED, 8, 9), annotation(DECOMPOSED, 10, 11)]
    edit(lambda d: d["a"]["annotations"].extend(odd))(folder)
    findings = check_folder(folder, **options)
    assert set(findings.classes.index) == {"run", "jump", kept} and findings.classes.train[kept] == 2
    assert {"unknown label", "near spellings"} & kinds(findings) == set()
    assert "'u\\u0308bung_1'" in of(findings, "other form").what and of(findings, "other form").severity == "note"
    assert "instance duplicate" in kinds(findings)


@pytest.mark.parametrize("change, words", [(lambda t: 30 * t, "not in seconds"), (lambda t: t / 30, "fractions")])
def test_times_in_other_units_are_errors(folder, change, words):
    def spoil(entries):
        for entry in entries.values():
            for item in entry["annotations"]:
                item["segment"] = [change(time) for time in item["segment"]]

    edit(spoil)(folder)
    finding = of(check_folder(folder), "units")
    assert finding.severity == "error" and words in finding.what


def test_labels(folder):
    more = {"a": "Run ", "d": "swim"}
    edit(lambda d: [d[name]["annotations"].append(annotation(label, 8, 9)) for name, label in more.items()])(folder)
    findings = check_folder(folder)
    assert "'Run ' and 'run'" in of(findings, "near spellings").what
    assert of(findings, "class without train instances").item == "class 'swim'"
    assert of(findings, "class without test instances").item == "class 'Run '"
    assert findings.classes.loc["run"].to_dict() == {"train": 4, "test": 1}
    assert {"unknown label"} == kinds(check_folder(folder, classes=["run", "jump"])) & {"unknown label"}


def test_many_and_long_names_and_many_near_duplicates_take_little_work(folder, monkeypatch):
    work, compare = [], difflib.get_close_matches

    def counting(word, others, *more):
        others = list(others)
        work.append(len(word) * sum(map(len, others)))
        return compare(word, others, *more)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    long = [f"{'a' * 990}{i:04}" for i in range(30)]
    short = [f"{'ab' * 28}{i:04}" for i in range(500)]
    edit(lambda entries: entries["a"].update(annotations=[annotation(label, 1, 2) for label in long + short]))(folder)
    for classes in (None, ["jump"] + long[:9], ["jump"] + short[:9]):
        findings = check_folder(folder, **SMALL, classes=classes)
        assert sum(finding.kind == "unknown label" for finding in findings.found) == 21 * (classes is not None)
    assert sum(work) < 20_000_000  # a second; the long labels alone would take half a minute
    edit(lambda entries: entries["a"].update(annotations=[annotation("jump", i / 1e5, 4) for i in range(500)]))(folder)
    assert sum(finding.kind == "near duplicates" for finding in check_folder(folder, **SMALL).found) == 100


def test_subsets_that_match_nothing_list_those_found(folder):
    findings = check_folder(folder, train=["trainig", "dev"], test="test")
    cases = findings.table[findings.table.kind == "subsets"]
    assert len(cases) == 2 and cases.what.str.contains("found: test, training").all()
    assert "did you mean 'training'?" in cases.mend.iloc[0]


def test_a_subset_without_annotations_is_an_error(folder):
    for split, subset, names in (("train", "training", "abc"), ("test", "test", "de")):
        edit(lambda d, names=names: [d[name].update(annotations=[]) for name in names])(folder)
        for options in ({}, dict(train="training", test="test")):
            finding = of(check_folder(folder, **options), "subsets")
            assert finding.severity == "error" and f"subset {subset!r} has {len(names)} videos" in finding.what
            assert f"name another for {split}" in finding.mend


def test_a_split_whose_instances_are_all_dropped(folder):
    edit(lambda d: [item.update(label="Ambiguous") for name in "abc" for item in d[name]["annotations"]])(folder)
    assert of(check_folder(folder), "no instances").severity == "error"
    edit(lambda d: [item.update(label="Ambiguous") for item in d["d"]["annotations"]])(folder)
    assert of(check_folder(folder), "no instances").severity == "warning"


# Features.


def test_transposed_files_are_one_error_with_one_mend(folder):
    for path in (folder / "features").iterdir():
        np.save(path, np.load(path).T)
    findings = check_folder(folder)
    assert {f.kind for f in findings.found if f.severity == "error"} == {"channels first"}
    assert '"channels_first": true' in of(findings, "channels first").mend
    assert check_folder(folder, channels_first=True).ok
    for path in (folder / "features").iterdir():
        np.save(path, np.load(path).T)
    assert '"channels_first": false' in of(check_folder(folder, channels_first=True), "channels first").mend


def lengths(durations, steps, *grid):
    "The findings on recordings of these durations, with so many steps each."
    found, path = Findings("x"), data.Path("x.npy")
    rows = zip(durations, steps)
    check.check_lengths({s: check.Recording(path, int(n), 8, s, TimeGrid(*grid)) for s, n in rows}, found, "features")
    return found


@pytest.mark.parametrize("fps, stride, snippet", [(29.97, 4, 16), (25, 8, 16), (10, 1, 1), (30, 16, 16)])
@pytest.mark.parametrize("how", ["whole snippets", "padded", "rounded"])
def test_usual_extractions_have_the_right_length(fps, stride, snippet, how):
    durations = [7.0 + 13.7 * i for i in range(12)]
    count = {"whole snippets": lambda n: (n - snippet) // stride + 1, "padded": lambda n: -(-n // stride),
             "rounded": lambda n: round(n / stride)}[how]
    assert not lengths(durations, [count(int(s * fps)) for s in durations], fps, stride, snippet).found


@pytest.mark.parametrize(
    "wrong, right",
    [((30, 4, 16), (30, 8, 16)), ((30, 16, 16), (30, 4, 16)), ((25, 4, 16), (30, 4, 16)), ((60, 5, 5), (30, 5, 5))],
)
def test_the_stride_or_rate_that_would_fit_is_named(wrong, right):
    durations = [40.0 + 33.3 * i for i in range(12)]
    finding = of(lengths(durations, [s * right[0] / right[1] for s in durations], *wrong), "time grid")
    expected = f"fps {right[0]} instead" if wrong[0] != right[0] else f"stride {right[1]} instead"
    assert expected in finding.mend and finding.severity == ("warning" if wrong[0] == 25 else "error")


RATES = [(12.5, 10, "10 fits better, so correct"), (10, 12.5, "10 fits better, so what is in use seems right")]


@pytest.mark.parametrize("in_use, stated, words", RATES)
def test_frame_rates_that_differ_are_one_warning(folder, in_use, stated, words):
    write(folder, fps=in_use)
    edit(lambda d: [entry.update(fps=stated) for entry in d.values()])(folder)
    finding = of(check_folder(folder), "frame rates")
    assert (finding.severity, finding.item) == ("warning", "dataset.json") and words in finding.mend
    assert finding.what == f"fps is {in_use:g} in use, but {stated:g} as stated for 5 of 5 videos, such as 'a'"
    assert "frame rates" not in kinds(check_folder(folder, fps=stated)) | kinds(check_folder(folder, resize=32))


@pytest.mark.parametrize("kind, content, words, wanted", SEVERAL.values(), ids=SEVERAL)
def test_the_message_about_a_file_of_several_arrays_is_whole(folder, kind, content, words, wanted):
    for path in (folder / "features").iterdir():
        np.savez(path.with_suffix(".npz"), np.load(path))
        torch.save(torch.from_numpy(np.load(path)), path.with_suffix(".pt"))
    path = folder / "features" / f"b.{kind}"
    np.savez(path, **content) if kind == "npz" else torch.save(content, path)
    finding = of(check_folder(folder, feature_format=kind), "feature file")
    assert [word for word in words if word not in finding.what] == [], finding.what
    assert finding.mend.startswith("save one array of them, by np.save('b.npy', ") and finding.mend.endswith(")")


def test_a_message_is_not_cut_inside_a_name(folder):
    edit(lambda d: d.update({"a; b": d.pop("a") | {"duration": "cut; short"}}))(folder)
    finding = of(check_folder(folder), "video entry")
    assert finding.what == "duration is 'cut; short'" and finding.mend.startswith("write a finite number")
    write(folder, classes=["run", "jumq; x", "jump"])
    edit(lambda d: d["a"]["annotations"].append(annotation("jumq; y", 3, 4)))(folder)
    finding = of(check_folder(folder), "unknown label")
    assert finding.what.endswith("the unknown label 'jumq; y'") and "did you mean 'jumq; x'?" in finding.mend


def test_memory_does_not_grow_with_the_recordings(folder):
    for name in "abc":
        save(np.zeros((30_000, 256), np.float16), name)(folder)  # 15 MB each, and 7.7 MB of True and False
    edit(lambda d: [d[name].update(duration=3000.0) for name in "abc"])(folder)
    tracemalloc.start()
    findings = check_folder(folder)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert findings.table.kind.tolist().count("all zero") == 3 and most < 5e6


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_other_formats_are_looked_through_as_well(folder, kind):
    for path in (folder / "features").iterdir():
        array = np.load(path)
        if path.stem == "b":
            array[7] = np.inf
        path.unlink()
        if kind == "npz":
            np.savez(path.with_suffix(".npz"), array)
        else:
            torch.save(torch.from_numpy(array), path.with_suffix(".pt"))
    findings = check_folder(folder, feature_format=kind)
    assert [finding.item for finding in findings.found if finding.severity == "error"] == [f"features/b.{kind}"]


# Windows and the time grid.


def test_lost_instances_are_those_of_the_windows(folder):
    edit(lambda d: d["a"]["annotations"].append(annotation("run", 2, 27)))(folder)
    loaded = load_dataset(folder)
    findings = check_folder(folder, window=96)
    lost = data.training_windows(loaded, 96).lost
    assert lost > 0 and findings.known["train windows"].endswith(f"without {lost} of the instances")
    cases = {finding.item: finding for finding in findings.found if finding.kind == "windows"}
    train = cases["train windows"]
    assert f"{lost} of 7 train instances" in train.what and train.severity == "warning"
    length = int(train.mend.split("window of ")[1].split()[0])
    held = data.training_windows(loaded, length).lost + data.test_windows(loaded, length).lost
    assert held <= 0.05 * 9


def test_no_training_window_at_all_is_an_error(folder):
    findings = check_folder(folder, window=2)
    assert [f.severity for f in findings.found if f.item == "train windows"] == ["error"]


@given(start=st.floats(0, 500), steps=st.floats(0.01, 80))
def test_rounding_to_steps_is_the_best_of_all_whole_steps(start, steps):
    segment = np.array([[start, start + steps]])
    ((low, high),) = check.round_to_steps(segment)
    assert (low + 0.5) % 1 == 0 and (high + 0.5) % 1 == 0 and high > low
    assert abs(low - start) <= 1 and abs(high - start - steps) <= 1


def test_short_instances(folder):
    edit(lambda d: d["a"]["annotations"].extend(annotation("run", 10 + i, 10.05 + i) for i in range(5)))(folder)
    finding = of(check_folder(folder, **SMALL), "resolution")
    assert finding.severity == "warning" and "38.5 % of 13 instances are shorter than one step" in finding.what
    assert "4 times as many" in finding.mend


# What a report looks like.


def test_groups_are_short_and_the_table_is_complete(folder):
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    findings = check_folder(folder)
    assert str(findings).count("is not there") == 3 and "... and 2 more" in str(findings)
    assert findings.markdown().count("is not there") == 3 and "2 more: error, missing features" in findings.markdown()
    assert len(findings.table) == len(findings.found) >= 5
    assert list(findings.table.columns) == ["severity", "kind", "item", "what", "mend"]
    assert json.loads(json.dumps(findings.to_dict()))["ok"] is False
    assert list(findings.facts.columns) == ["fact", "value"]


def test_severities_come_in_order_and_pipes_do_not_break_tables():
    findings = Findings("x")
    for severity in ("note", "error", "warning"):
        findings.add(severity, "a|b", "what", severity=severity, mend="mend")
    assert findings.table.severity.tolist() == ["error", "warning", "note"]
    rows = [line for line in findings.markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_data_check_is_this_check(folder):
    assert data.check(folder, window=64).to_dict() == check_folder(folder, window=64).to_dict()


# The layouts of the common releases.


def thumos_layout(folder, names, turned):
    "The layout of the widely used release, with features simulated at the real lengths."
    source = data.find_data("thumos14")
    if source is None:
        pytest.skip("the THUMOS14 annotations are not on this machine")
    whole = data.read_json(source / "annotations.json")
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
    usual = {"class without test instances", "class without train instances", "windows"}
    assert findings.ok and kinds(findings) <= usual, str(findings)
    assert findings.known["channels"] == "2048" and findings.known["stride"] == "4"
    loaded = load_dataset(folder, **options, in_memory=False)
    assert (len(loaded.split("train")), len(loaded.split("test")), loaded.channels) == (3, 2, 2048)
    assert findings.known["train windows"].startswith(f"{len(data.training_windows(loaded))},")
    assert loaded.features(HANDFUL[0]).shape[0] == loaded.by_name[HANDFUL[0]].steps
    wrong = check_folder(folder, **options | {"channels_first": not turned})
    assert '"channels_first": ' + json.dumps(turned) in of(wrong, "channels first").mend


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
    assert {video.steps for video in loaded.videos} == {192} and "testing (3 videos" in findings.known["subsets found"]


def test_activitynet_without_its_settings_is_explained(tmp_path):
    folder = activitynet_layout(tmp_path / "anet", 100)
    findings = check_folder(folder)
    assert {"annotation file", "annotations elsewhere", "feature folder"} == kinds(findings)
    more = dict(annotations="activity_net.v1-3.min.json", features="i3d_features")
    assert '"prefix": "v_"' in check_folder(folder, **more).table.query("kind == 'missing features'").mend.iloc[0]
    more |= dict(prefix="v_", fps=25.0, stride=16, snippet=16)
    assert '"resize": 100' in of(check_folder(folder, **more), "time grid").mend
    assert check_folder(folder, resize=100, window=100, **more).ok


# Tables of segments.

ROWS = [("a", 1, 3, "run"), ("a", 5, 8.5, "jump"), ("b", 0, 2, "run"), ("c", 2, 4, "jump")]


def segments(path, header="video,start,end,label", rows=ROWS, delimiter=",", end="\n"):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text(end.join(lines) + end)
    return path


def stored(folder):
    return json.loads((folder / "annotations.json").read_text())["database"]


@pytest.mark.parametrize("header, delimiter, end", [
    ("video,start,end,label", ",", "\n"),
    ("Video_ID;T_Start;T_End;Class", ";", "\r\n"),
    ("filename\tbegin\tend\taction", "\t", "\n"),
    ("\ufeffvideo,Start (s),End (s),Label", ",", "\n")])
def test_the_usual_tables_are_read(tmp_path, header, delimiter, end):
    table = segments(tmp_path / "table", header, delimiter=delimiter, end=end)
    done = import_segments(table, tmp_path / "x", test_share=0.34)
    entries = stored(tmp_path / "x")
    assert done.instances == 4 and done.videos == 3 and list(entries) == ["a", "b", "c"]
    assert [item["segment"] for item in entries["a"]["annotations"]] == [[1, 3], [5, 8.5]]
    assert sorted(entry["subset"] for entry in entries.values()) == ["test", "training", "training"]
    assert entries["a"]["duration"] == 8.5 and "warning" in str(done)


def test_columns_of_subsets_and_durations_and_recordings_without_actions(tmp_path):
    rows = [("a", 1, 3, "run", "train", 30), ("a", 5, 8, "jump", "train", ""), ("b", "", "", "", "val", 12)]
    table = segments(tmp_path / "t.csv", "video,start,end,label,split,duration", rows)
    done = import_segments(table, tmp_path / "x")
    assert stored(tmp_path / "x")["b"] == {"subset": "val", "duration": 12, "annotations": []}
    assert "warning" not in str(done) and "train 1, val 1" in str(done)
    with pytest.raises(DataError, match="leave test_share out"):
        import_segments(table, tmp_path / "y", test_share=0.5)


def test_durations_from_features_make_a_folder_that_loads(folder):
    entries = database().items()
    rows = [(name, *item["segment"], item["label"]) for name, entry in entries for item in entry["annotations"]]
    (folder / "dataset.json").write_text(json.dumps({"fps": 10, "stride": 1, "snippet": 1}))
    done = import_segments(segments(folder / "t.csv", rows=rows), folder, force=True, test_share=0.5)
    assert "durations from the features: 4 videos" in done.notes
    assert {name: entry["duration"] for name, entry in stored(folder).items()} == {"a": 30, "b": 20, "c": 5, "d": 25}
    assert check_folder(folder, **SMALL).ok and len(load_dataset(folder).ground_truth(None)) == 8


NAMES = "video,start,end,label"


@pytest.mark.parametrize("header, rows, words", [
    ("clip,start,end,label", ROWS, ["no column for the video", "found: clip, start, end, label", "columns="]),
    ("video,start,begin,end,label", [("a", 1, 2, 3, "x")], ["'start' and 'begin'", "--column start="]),
    (NAMES, [("a", 1, 3, "x"), ("a", 3, 1, "x"), ("a", -1, 1, "x")], ["line 3: ends at 1 s", "line 4"]),
    (NAMES, [("a", -1, 1, "x")], ["line 2", "start: time '-1'", "from 0"]),
    (NAMES, [("a", "1,5", 3, "x")], ["line 2", "5 cells instead of 4", "quote"]),
    (NAMES, [("a", "one", 3, "x")], ["line 2", "start: time 'one'", "h:m:s"]),
    (NAMES, [("a", "nan", 3, "x")], ["line 2", "start: time 'nan'", "write a number"]),
    (NAMES, [("a", 1, "00:00:03:12", "x")], ["line 2", "end: time '00:00:03:12' ends in frames", "--fps"]),
    (NAMES, [("a", "0:61", "1:20", "x")], ["line 2", "'0:61' has minutes or seconds of 60 or more"]),
    (NAMES, [("a", "1_0", 30, "x")], ["line 2", "start: time '1_0'"]),
    (NAMES, [("a", 1, 3, "")], ["line 2", "no label"]),
    (NAMES, [("", 1, 3, "x")], ["line 2", "no name"]),
    (f"{NAMES},subset", [("a", 1, 3, "x", "train"), ("a", 4, 5, "x", "test")],
     ["line 3", "'a'", "'test'", "'train'", "write the same"]),
    (f"{NAMES},subset", [("a", 1, 3, "x", "")], ["line 2", "subset is ''"]),
    (f"{NAMES},duration", [("a", 1, 3, "x", 9), ("a", 4, 5, "x", 8), ("b", 1, 2, "x", 9)],
     ["line 3", "duration 8", "write the same", "--ignore"]),
    (f"{NAMES},duration", [("a", 0, 0.5, "x", 0), ("b", 4, 5, "x", 8)], ["line 2", "duration is 0"]),
    ("video,start_frame,end_frame,label", ROWS, ["frames", "fps="]),
    ("video,start (ms),end (ms),label", ROWS, ["'start (ms)' holds milliseconds", "write seconds"]),
    ("video,Start Time (msec),end,label", ROWS, ["'Start Time (msec)' holds milliseconds", "write seconds"]),
    ("video,start (min),end (min),label", ROWS, ["'start (min)' holds minutes", "write seconds"]),
    ("video,start,end (Minutes),label", ROWS, ["'end (Minutes)' holds minutes", "write seconds"]),
    ("video,start,end,label,duration (min)", [(*row, 1) for row in ROWS], ["'duration (min)' holds minutes"]),
    ("video,start_sec,end_frame,label", ROWS, ["'start_sec' holds seconds and 'end_frame' holds frames"]),
    ("video,start,end_frame,label", ROWS, ["'end_frame' holds frames", "fps="]),
    (NAMES, [], ["no rows"]),
    (NAMES, [("a", "", "", "")] + ROWS[2:], ["line 2", "no segment, no duration and no features"]),
    (NAMES, ROWS[:2], ["1 videos cannot be split"])])
def test_bad_tables_are_refused_with_line_and_mend_and_nothing_is_written(tmp_path, header, rows, words):
    table = segments(tmp_path / "t.csv", header, rows)
    with pytest.raises(DataError) as caught:
        import_segments(table, tmp_path / "x")
    message = str(caught.value)
    assert [word for word in ["t.csv", *words] if word not in message] == [], message
    assert "\n" not in message and not (tmp_path / "x").exists()


@pytest.mark.parametrize("header", ["start_sec,end_sec", "Start Time (s),End Time (s)", "start (seconds),end"])
def test_times_in_seconds_are_not_divided_by_a_rate(tmp_path, header):
    table = segments(tmp_path / "t.csv", f"video,{header},label")
    with pytest.raises(DataError, match="holds seconds; leave fps out"):
        import_segments(table, tmp_path / "x", fps=25)
    import_segments(table, tmp_path / "x")
    assert stored(tmp_path / "x")["a"]["annotations"][0]["segment"] == [1, 3]


def test_a_unit_holds_for_a_column_that_is_named(tmp_path):
    table = segments(tmp_path / "t.csv", "video,start_ms,end_ms,label")
    with pytest.raises(DataError, match="'start_ms' holds milliseconds"):
        import_segments(table, tmp_path / "x", columns={"start": "start_ms", "end": "end_ms"})


@pytest.mark.parametrize("header", [
    "start_time,end_time", "t_start,t_end", "start_timestamp,end_timestamp", "start (h:m:s),end (min:sec)"])
def test_headers_without_a_unit_are_frames_where_a_rate_is_given(tmp_path, header):
    import_segments(segments(tmp_path / "t.csv", f"video,{header},label"), tmp_path / "x", fps=2)
    assert stored(tmp_path / "x")["a"]["annotations"][0]["segment"] == [0.5, 1.5]


def test_a_segment_of_no_length_is_a_note(tmp_path):
    done = import_segments(segments(tmp_path / "t.csv", rows=[*ROWS[:3], ("c", 2, 2, "jump")]), tmp_path / "x")
    assert "1 segments of no length, which loading drops (line 5)" in done.notes
    assert "no length" not in str(import_segments(segments(tmp_path / "u.csv"), tmp_path / "y"))


# A column of durations that are not the recordings'.


def rows_with(durations, spans=((40, 55), (12, 20), (0, 7), (3, 3.5))):
    return [(name, *span, "x", length) for name, span, length in zip("abcdefghijklmnopqrst", spans, durations)]


@pytest.mark.parametrize("rows, fps", [
    (rows_with((15, 8)), None),
    (rows_with((15, 8, 7, 0.5)), None),
    (rows_with((15.02, 7.98, 7, 0.5)), None),
    (rows_with(("0:15", "0:08")), None),
    (rows_with((15, 8), [(40.2, 55.1), (12.4, 20.3)]), None),  # rounded to seconds
    (rows_with((15,) * 19 + (999,), [(10 + i, 25 + i) for i in range(20)]), None),  # nearly all
    (rows_with((15,) * 8 + (999,) * 2, [(10 + i, 25 + i) for i in range(10)]), None),  # most
    (rows_with((45, 30), [(30, 75), (900, 930)]), 30),  # frames
    (rows_with((46, 31), [(30, 75), (900, 930)]), 30),  # the last frame counted
    ([("a", 1, 3, "x", 2), ("a", 8, 9, "y", 1), ("b", 2, 3, "x", 1)], None)])
def test_a_duration_that_is_the_segments_own_is_not_used(tmp_path, rows, fps):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x", fps=fps)
    entry = stored(tmp_path / "x")["a"]
    assert entry["duration"] == entry["annotations"][-1]["segment"][1]
    (note,) = [note for note in done.notes if "column 'duration'" in note]
    assert "not used" in note and "durations from the last segment" in str(done)


def test_a_duration_that_no_recording_can_have_is_not_used(tmp_path):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},Duration", rows_with((0.5, 0.25))), tmp_path / "x")
    (note,) = [note for note in done.notes if "column 'Duration'" in note]
    assert "2 of 2 segments end after it" in note and stored(tmp_path / "x")["b"]["duration"] == 20


@pytest.mark.parametrize("rows", [
    rows_with((60, 30)),
    rows_with((60, 30), [(40, 60.4), (12, 30)]),  # the end is later by less than a second: cut in loading
    rows_with((7, 5), [(0, 7), (0, 5)]),  # both readings give this
    [("a", 3, 5, "x", 60), ("a", 8, 10, "x", 60), ("b", 2, 4, "x", 60)]])
def test_durations_of_the_recordings_are_used(tmp_path, rows):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x")
    assert [entry["duration"] for entry in stored(tmp_path / "x").values()] == [rows[0][-1], rows[-1][-1]]
    assert "durations from the table: 2 videos" in done.notes and "column" not in str(done)


def test_a_duration_that_contradicts_some_ends_is_a_warning_that_names_them(tmp_path):
    spans = [(40, 55), (12, 20), (0, 8), (2, 70)]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration", rows_with((60, 30, 10, 9), spans))
    done = import_segments(table, tmp_path / "x")
    (warning,) = [note for note in done.notes if "end after" in note]
    assert "1 segments end after the duration of their recording (line 5)" in warning
    assert "--ignore 'duration'" in warning
    assert stored(tmp_path / "x")["d"]["duration"] == 9
    import_segments(table, tmp_path / "y", ignore=["duration"])
    assert stored(tmp_path / "y")["d"]["duration"] == 70
    own = segments(tmp_path / "own.csv", f"{NAMES},duration", rows_with((15, 8)))
    named = import_segments(own, tmp_path / "z", columns={"duration": "duration"})  # it is what it is said to be
    assert any("2 segments end after" in note for note in named.notes) and stored(tmp_path / "z")["a"]["duration"] == 15


def test_a_duration_in_seconds_beside_frames_is_said_to_be_that(tmp_path):
    rows = [("a", 30, 75, "x", 10), ("b", 0, 15, "x", 12)]
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x", fps=30)
    assert stored(tmp_path / "x")["a"]["duration"] == 10
    assert [note for note in done.notes if "'duration' is read as seconds" in note]


def test_columns_are_ignored_when_asked(tmp_path, capsys):
    rows = [("a", 1, 3, "x", "junk", 5), ("b", 2, 3, "x", "", 6)]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration,onset", rows)
    with pytest.raises(DataError, match="'start' and 'onset' may both be the start"):
        import_segments(table, tmp_path / "x")
    with pytest.raises(DataError, match=r"no column 'onsett'.*found: video, start, end, label, duration, onset"):
        import_segments(table, tmp_path / "x", ignore=["duration", "onsett"])
    with pytest.raises(DataError, match="columns names 'lable'.*video, start, end, label"):
        import_segments(table, tmp_path / "x", columns={"lable": "label"}, ignore=["onset"])
    import_segments(table, tmp_path / "x", ignore=["duration", "onset"])
    assert stored(tmp_path / "x")["a"]["duration"] == 3
    assert main(["import", str(table), str(tmp_path / "y"), "--ignore", "duration", "--ignore", "onset"]) == 0
    assert stored(tmp_path / "y") == stored(tmp_path / "x")
    assert main(["import", str(table), str(tmp_path / "z"), "--ignore", "Duration"]) == 2
    assert "no column 'Duration' to ignore" in capsys.readouterr().err


# Recordings in folders.


@pytest.mark.parametrize("first, second, name", [
    ("P01/cam1/cereals.avi", "P02/cam1/cereals.avi", "P02_cam1_cereals"),
    ("P01\\cereals.avi", "P02\\cereals.avi", "P02_cereals"),
    ("cereals.avi", "/data/P02/cereals.avi", "data_P02_cereals"),
    ("cereals.avi", "D:\\v\\cereals.avi", "'v_cereals'"),
    ("P01/cereals.avi", "cereals.avi", "else own names and features"),
    ("C:/cereals.avi", "D:/cereals.avi", "else own names and features")])
def test_two_recordings_of_one_name_are_refused(tmp_path, first, second, name):
    table = segments(tmp_path / "t.csv", rows=[(first, 1, 2, "x"), ("other", 1, 2, "x"), (second, 5, 6, "y")])
    with pytest.raises(DataError) as caught:
        import_segments(table, tmp_path / "x")
    message = str(caught.value)
    wanted = ["t.csv, line 4", repr(first), "line 2", repr(second), "would both be 'cereals'", name]
    assert [word for word in wanted if word not in message] == [], message


@pytest.mark.parametrize("first, second", [
    ("./P01/a.avi", "P01/a.avi"), ("P01\\a.avi", "P01//a.avi"), ("x/../P01/a.avi", "P01/a.AVI"), ("a", "./a.mp4"),
    ("a.mp4", "a.wav"), ("\u00fcbung.mp4", "u\u0308bung.mp4")])
def test_a_path_written_in_two_ways_is_one_recording(tmp_path, first, second):
    table = segments(tmp_path / "t.csv", rows=[(first, 1, 2, "x"), ("other", 1, 2, "x"), (second, 5, 6, "y")])
    done = import_segments(table, tmp_path / "x")
    entries = stored(tmp_path / "x")
    assert done.videos == 2 and [len(entry["annotations"]) for entry in entries.values()] == [2, 1]
    assert first.endswith(("a.mp4", "a")) == any("taken for one recording" in note for note in done.notes)


def test_the_endings_of_videos_are_those_that_features_are_made_of(tmp_path):
    rows = [(f"film{i}{ending.upper()}", 1, 2, "x") for i, ending in enumerate(check.VIDEOS)]
    import_segments(segments(tmp_path / "t.csv", rows=rows), tmp_path / "x")
    assert list(stored(tmp_path / "x")) == [f"film{i}" for i in range(len(check.VIDEOS))] and ".wmv" in check.VIDEOS


# Files as spreadsheets write them.


@pytest.mark.parametrize("first, delimiter", [("sep=;", ";"), ('"sep=,"', ","), ("SEP=\t", "\t"), ("sep=|", "|")])
def test_the_first_line_may_name_the_delimiter(tmp_path, first, delimiter):
    table = segments(tmp_path / "t.csv", f"{first}\r\n{NAMES.replace(',', delimiter)}", delimiter=delimiter, end="\r\n")
    assert import_segments(table, tmp_path / "x").instances == 4
    bad = segments(tmp_path / "b.csv", f"{first}\n{NAMES.replace(',', delimiter)}", [("a", 3, 1, "x")], delimiter)
    with pytest.raises(DataError, match="line 3: ends at 1 s"):
        import_segments(bad, tmp_path / "y")


CSV = "video,start,end,label\na,1,2,x\nb,1,2,x\n"


@pytest.mark.parametrize("name, content, words", [
    ("t.xlsx", b"PK\x03\x04" + bytes(range(256)), "is an Excel workbook; save it as CSV (UTF-8)"),
    ("t.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "is an Excel workbook; save it as CSV (UTF-8)"),
    ("t.ods", b"PK\x03\x04" + bytes(100), "is a zip file, as workbooks are; save it as CSV (UTF-8)"),
    ("t.csv", CSV.encode("utf-16"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.encode("utf-16-be"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.replace("x", "\u8dd1").encode("utf-16-le"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.replace("x", "x\0").encode(), "is no table of text; save it as CSV (UTF-8)"),
    ("t.npy", b"\x93NUMPY\1\0v\0" + bytes(range(90)) * 2, "is no table of text; save it as CSV (UTF-8)"),
    ("t.csv.gz", gzip.compress(CSV.encode(), mtime=0), "is a gzip file; unpack it"),
    ("t.csv", CSV.replace(",", ";").replace("1", "1,5").encode(), "start: time '1,5'; write a number"),
    ("t.csv", CSV.replace(",", ";").replace("1", "1,5").encode(), "a point instead of the comma"),
    ("t.csv", CSV.replace("a,1", "a,1,5").encode(), "5 cells instead of 4; quote what contains a delimiter, and")])
def test_a_file_as_spreadsheets_write_it_is_told_the_way_out(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        import_segments(tmp_path / name, tmp_path / "x")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and words in message and "\n" not in message, message


# Rates and times.


@pytest.mark.parametrize("rate", [0, -25, math.nan, math.inf, True, 1e9])
def test_a_rate_is_positive(tmp_path, rate):
    with pytest.raises(DataError, match="frames a second above 0"):
        import_segments(segments(tmp_path / "t.csv"), tmp_path / "x", fps=rate)
    assert main(["import", str(tmp_path / "t.csv"), str(tmp_path / "x"), f"--fps={rate}"]) == 2
    assert not (tmp_path / "x").exists()


def test_clock_times_are_not_frames(tmp_path):
    rows = [("a", "0:01:02", "00:01:03:15", "x", "2:00"), ("b", 1500, 3000, "x", "2:00")]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration", rows)
    import_segments(table, tmp_path / "x", fps=25, ignore=[])
    spans = [entry["annotations"][0]["segment"] for entry in stored(tmp_path / "x").values()]
    assert spans == [[62, 63.6], [60, 120]] and stored(tmp_path / "x")["a"]["duration"] == 120
    assert main(["import", str(table), str(tmp_path / "y"), "--fps", "30000/1001"]) == 0
    assert stored(tmp_path / "y")["b"]["annotations"][0]["segment"] == [50.05, 100.1]


def test_unreadable_tables(tmp_path):
    (tmp_path / "t.csv").write_bytes("video,start,end,label\nä,1,2,x\n".encode("latin-1"))
    for path, words in ((tmp_path / "t.csv", "UTF-8"), (tmp_path / "none.csv", "check the path")):
        with pytest.raises(DataError, match=words):
            import_segments(path, tmp_path / "x")


def test_frames_and_named_columns(tmp_path):
    rows = [("a", 30, 75, "cut"), ("b", 0, 15, "cut")]
    table = segments(tmp_path / "t.csv", "clip,start_frame,stop_frame,verb", rows)
    import_segments(table, tmp_path / "x", fps=30, columns={"video": "clip", "label": "verb"})
    entry = stored(tmp_path / "x")["a"]
    assert entry["annotations"] == [annotation("cut", 1.0, 2.5)] and entry["fps"] == 30
    options = "--fps 30 --column video=clip --column label=verb".split()
    assert main(["import", str(table), str(tmp_path / "y"), *options]) == 0
    assert stored(tmp_path / "y") == stored(tmp_path / "x")


def test_features_are_opened_only_for_a_duration_that_the_table_does_not_say(folder):
    save(np.array([{}], dtype=object), "a")(folder)
    rows = [("a", 1, 3, "run", 30), ("b", 1, 3, "run", 20)]
    import_segments(segments(folder / "t.csv", f"{NAMES},duration", rows), folder, force=True)
    assert [entry["duration"] for entry in stored(folder).values()] == [30, 20]
    (folder / "dataset.json").write_text(json.dumps({"fps": 10, "stride": 1, "snippet": 1}))
    with pytest.raises(DataError, match="pickled"):
        import_segments(segments(folder / "t.csv"), folder, force=True)


def test_an_annotation_file_is_replaced_only_when_asked(tmp_path):
    table, folder = segments(tmp_path / "t.csv"), tmp_path / "x"
    import_segments(table, folder)
    before = (folder / "annotations.json").read_bytes()
    with pytest.raises(DataError, match="--force"):
        import_segments(table, folder, seed=5)
    assert (folder / "annotations.json").read_bytes() == before
    (tmp_path / "y" / "annotations.json").mkdir(parents=True)
    with pytest.raises(DataError, match="annotations.json: is a folder"):
        import_segments(table, tmp_path / "y")
    import_segments(segments(table, rows=ROWS[:3]), folder, force=True)
    assert list(stored(folder)) == ["a", "b"] and [path.name for path in folder.iterdir()] == ["annotations.json"]


@given(
    names=st.sets(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8), min_size=2, max_size=40),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 9),
)
def test_drawn_subsets_depend_on_names_and_seed_only(names, share, seed):
    drawn = check.draw_subsets(sorted(names), share, seed)
    assert drawn == check.draw_subsets(sorted(names, reverse=True), share, seed) and set(drawn) == names
    tests = list(drawn.values()).count("test")
    assert 1 <= tests < len(names) and abs(tests - share * len(names)) <= 1


# The command.


def test_the_command_prints_the_findings_and_ends_in_0_or_2(folder, tmp_path, capsys):
    wanted = [tmp_path / "out.json", tmp_path / "out.md"]
    assert main(["check", str(folder), "--window", "64", "--json", str(wanted[0]), "--markdown", str(wanted[1])]) == 0
    shown, findings = capsys.readouterr(), check_folder(folder, window=64)
    assert shown.out == f"{findings}\n" and shown.err == ""
    assert json.loads(wanted[0].read_text()) == findings.to_dict() and wanted[1].read_text() == findings.markdown()
    save(np.array([{}], dtype=object))(folder)
    assert main(["check", str(folder), "--json", str(wanted[0])]) == 2
    shown = capsys.readouterr()
    assert "pickled objects" in shown.out and json.loads(wanted[0].read_text())["ok"] is False
    assert shown.err.startswith("selfdetr-data: error: sports: cannot be trained on (1 error")
    assert shown.err.count("\n") == 1


def test_the_options_of_the_command_reach_the_check(folder, capsys):
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    assert main(["check", str(folder), "--prefix", "v_", "--stride", "1", "--snippet", "1", "--train", "training"]) == 0
    assert main(["check", str(folder), "--prefix", "v_", "--stride", "4", "--train", "dev"]) == 2
    shown = capsys.readouterr().out
    assert "set stride 1 instead of 4" in shown and "no video is in subset 'dev'" in shown


@pytest.mark.parametrize("arguments, message", [
    ("check nowhere", "nowhere: no such folder"),
    ("import none.csv x", "none.csv: cannot be read"),
    ("import none.csv x --column verb", "WHAT=NAME"),
    ("check . --window 0", "--window: '0'; give a whole number from 1"),
    ("check . --overlap 1", "--overlap: '1'; give a number from 0 below 1"),
    ("check . --keep 0", "--keep: '0'; give a number above 0 to 1"),
    ("check . --fps 0", "frames a second above 0"),
    ("check . --stride nan", "--stride: 'nan'; give a number above 0"),
    ("check . --min-seconds=-1", "--min-seconds: '-1'; give a number from 0"),
    ("check . --resize 1.5", "--resize: '1.5'; give a whole number from 1"),
    ("check . --release thumos", "choose from"),
    ("check . --windoww 3", "unrecognized arguments: --windoww 3; see selfdetr-data --help"),
    ("chek .", "invalid choice: 'chek'"),
    ("", "required: command"),
    ("check", "required: folder; see selfdetr-data check --help"),
    ("check . --json dataset.json/x", "dataset.json is a file"),
    ("check . --markdown features", "features: is a folder"),
    ("check . --json annotations.json", "annotations.json: is read or written by this call already"),
    ("check . --json new --markdown ./new", "new: is read or written by this call already"),
    ("import t.csv x --test-share 1", "--test-share: '1'; give a number above 0 below 1"),
    ("import t.csv x --seed -1", "--seed: '-1'; give a whole number from 0"),
    ("import t.csv x --fps 25,0", "frames a second above 0"),
    ("import t.csv x --column lable=verb", "columns names 'lable'"),
    ("import t.csv dataset.json", "dataset.json is a file"),
    ("import none.csv x --ignore", "expected one argument")])
def test_what_cannot_be_used_is_one_line_and_status_2(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    segments(folder / "t.csv")
    if "check" in arguments and arguments != "check nowhere":  # the arguments come before the folder
        monkeypatch.setattr(check, "check_folder", None)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr-data: error: ") and error.count("\n") == 1 and message in error
