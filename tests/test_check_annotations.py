"""Every fault of an annotation file is a finding, and what is left is used."""

import difflib
import json

import pytest
from checking import SMALL, kinds, of
from sports import COMPOSED, DECOMPOSED, annotation, database, edit

from selfdetr.check.annotations import _near_spellings
from selfdetr.check.folder import check_folder

ITEM = {"video": "a", "segment": [1, 2], "label": "run"}
FOREIGN = {
    "plain list": ([ITEM, ITEM], ["list of 2 entries", "video, segment, label", "selfdetr data import"]),
    "database as a list": ({"database": [ITEM]}, ['list under "database"', "write"]),
    "empty database": ({"database": {}}, ["without videos"]),
    "videos": ({"videos": {"a": {"subset": "training"}}}, ['under "videos"', '"database"']),
    "COCO": ({"images": [], "annotations": [], "categories": []}, ["COCO", "category"]),
    "captions": ({"v_a": {"duration": 3, "timestamps": [[0, 1]], "sentences": ["x"]}}, ["captions", "class"]),
    "results": ({"version": "1", "results": {"a": []}}, ["detections", "selfdetr evaluate"]),
    "no database": (database(), ['without the "database"', "around"]),
    "MultiTHUMOS": ({"a": {"subset": "testing", "duration": 3, "actions": [[3, 1, 2]]}}, ["MultiTHUMOS", "class"]),
    "lists by video": ({"a": [[1, 2, "run"]]}, ["list of segments", "selfdetr data import"]),
}


@pytest.mark.parametrize("content, words", FOREIGN.values(), ids=FOREIGN)
def test_other_layouts_are_recognised(folder, content, words):
    (folder / "annotations.json").write_text(json.dumps(content))
    findings = check_folder(folder)
    finding = of(findings, "annotation layout")
    said = f"{finding.problem} {finding.fix}"
    assert finding.severity == "error" and [word for word in words if word not in said] == [], said


def test_what_lies_beside_a_missing_annotation_file(folder):
    (folder / "annotations").mkdir()
    (folder / "annotations.json").rename(folder / "annotations" / "thumos14.json")
    (folder / "annotations" / "BasketballDunk_val.txt").write_text("video_validation_0000001  12.3 45.6\n")
    (folder / "segments.tsv").write_text("video\tstart\tend\tlabel\n")
    (folder / "readme.txt").write_text("not a table of segments\n")
    findings = check_folder(folder)
    items = {finding.item: finding for finding in findings.found if finding.kind == "annotations elsewhere"}
    assert set(items) == {"annotations/thumos14.json", "annotations/BasketballDunk_val.txt", "segments.tsv"}
    assert '"annotations": "annotations/thumos14.json"' in items["annotations/thumos14.json"].fix
    assert "import segments.tsv" in items["segments.tsv"].fix
    assert check_folder(folder, annotations="annotations/thumos14.json").ok


def test_names_listed_twice_are_all_named_and_the_rest_is_checked(folder):
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"c": {', '"b": {').replace('"e": {', '"d": {'))
    findings = check_folder(folder)
    twice = findings.table[findings.table.kind == "listed twice"]
    assert len(twice) == 2 and "test (1 videos" in findings.facts["subsets found"]


def test_odd_instances_are_warnings_with_their_video(folder):
    odd = [("run", 29, 31), ("jump", 31, 33), ("run", 1, 3), ("run", 1.05, 3), ("jump", 1.05, 3), ("Ambiguous", 4, 5),
           ("run", 10, 10.01)]
    edit(lambda d: d["a"]["annotations"].extend(annotation(*row) for row in odd))(folder)
    findings = check_folder(folder, min_seconds=0.02, **SMALL)
    found = {finding.kind: finding for finding in findings.found if finding.item == "video 'a'"}
    of_instances = {f"instance {kind}" for kind in ("clipped", "beyond", "duplicate", "ignored", "short")}
    assert set(found) == of_instances | {"near duplicates"}
    assert findings.ok and "0.97" in found["near duplicates"].problem and found["instance ignored"].severity == "note"


def test_an_instance_of_no_length_is_a_warning(folder):
    edit(lambda d: d["a"]["annotations"].append(annotation("run", 0, 0)))(folder)
    findings = check_folder(folder)
    finding = of(findings, "instance no length")
    assert findings.ok and (finding.severity, finding.item) == ("warning", "video 'a'")
    assert "run 0-0 s" in finding.problem


@pytest.mark.parametrize("options, kept", [({}, COMPOSED), (dict(classes=["run", "jump", DECOMPOSED]), DECOMPOSED)])
def test_a_label_in_two_unicode_forms_is_one_class_and_a_note(folder, options, kept):
    odd = [annotation(COMPOSED, 8, 9), annotation(DECOMPOSED, 8, 9), annotation(DECOMPOSED, 10, 11)]
    edit(lambda d: d["a"]["annotations"].extend(odd))(folder)
    findings = check_folder(folder, **options)
    assert set(findings.classes.index) == {"run", "jump", kept} and findings.classes.train[kept] == 2
    assert {"unknown label", "near spellings"} & kinds(findings) == set()
    assert "'u\\u0308bung_1'" in of(findings, "other form").problem and of(findings, "other form").severity == "note"
    assert "instance duplicate" in kinds(findings)


@pytest.mark.parametrize("change, words", [(lambda t: 30 * t, "not in seconds"), (lambda t: t / 30, "fractions")])
def test_times_in_other_units_are_errors(folder, change, words):
    def spoil(entries):
        for entry in entries.values():
            for item in entry["annotations"]:
                item["segment"] = [change(time) for time in item["segment"]]

    edit(spoil)(folder)
    finding = of(check_folder(folder), "units")
    assert finding.severity == "error" and words in finding.problem


def test_labels(folder):
    more = {"a": "Run ", "d": "swim"}
    edit(lambda d: [d[name]["annotations"].append(annotation(label, 8, 9)) for name, label in more.items()])(folder)
    findings = check_folder(folder)
    assert "'Run ' and 'run'" in of(findings, "near spellings").problem
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
    _near_spellings([chr(0x4E00 + i) for i in range(501)])
    assert not work  # the pairs are too many
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
    assert len(cases) == 2 and cases.problem.str.contains("found: test, training").all()
    assert "did you mean 'training'?" in cases.fix.iloc[0]


def test_a_subset_without_annotations_is_an_error(folder):
    for split, subset, names in (("train", "training", "abc"), ("test", "test", "de")):
        edit(lambda d, names=names: [d[name].update(annotations=[]) for name in names])(folder)
        for options in ({}, dict(train="training", test="test")):
            finding = of(check_folder(folder, **options), "subsets")
            assert finding.severity == "error" and f"subset {subset!r} has {len(names)} videos" in finding.problem
            assert f"name another for {split}" in finding.fix


def test_a_split_whose_instances_are_all_dropped(folder):
    edit(lambda d: [item.update(label="Ambiguous") for name in "abc" for item in d[name]["annotations"]])(folder)
    assert of(check_folder(folder), "no instances").severity == "error"
    edit(lambda d: [item.update(label="Ambiguous") for item in d["d"]["annotations"]])(folder)
    assert of(check_folder(folder), "no instances").severity == "warning"
