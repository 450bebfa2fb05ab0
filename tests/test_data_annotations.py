"""Annotation files: what is handled and counted, names in two forms, and what a lenient reader finds."""

import json

import numpy as np
import pytest
from sports import CHANNELS, COMPOSED, DECOMPOSED, INSTANCES, annotation, database, edit, write

from selfdetr.data.annotations import QUIRKS, read_annotations, read_entries
from selfdetr.data.dataset import load_dataset
from selfdetr.data.files import DataError, find_data


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
    assert set(loaded.report) == set(QUIRKS) - {"short", "labels", "fps", "other form"}
    assert load_dataset(folder, min_seconds=1.0).report["short"] == ["b: run 4-4.5 s"]
    assert loaded.classes == ("jump", "run")
    assert loaded.videos[0].segments.tolist() == [[1, 3], [2.5, 6.5], [28, 29.95], [29, 30]]
    assert "\n" not in loaded.summary() and "beyond their video, dropped: 2" in loaded.summary()


def test_two_actions_that_are_one_when_clipped_are_one(folder):
    edit(lambda d: items(d, "b").extend([annotation("run", 15, 20.4), annotation("run", 15, 21)]))(folder)
    found = read_annotations(folder)
    assert found.report["duplicate"] == ["b: run 15-21 s"] and found.videos[1].segments[2:].tolist() == [[15, 20]]


def test_a_label_that_is_a_number_is_not_said_to_be_missing(folder):
    edit(lambda d: items(d, "b").append(annotation(0, 1, 2)))(folder)
    with pytest.raises(DataError, match="annotation 2: label is 0; write one line"):
        read_annotations(folder)


def test_a_folder_that_is_called_by_a_point_has_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found, loaded = read_annotations("."), load_dataset(".")
    assert found.summary().startswith("sports: 3 training") and loaded.summary().startswith("sports: 3 training")
    other = load_dataset("../sports")
    for refused in (lambda: found.split("val"), lambda: loaded.features("z"), lambda: other.split("")):
        with pytest.raises(DataError, match="^sports: there is no"):
            refused()
    (folder.parent / "linked").symlink_to(folder)
    assert read_annotations(folder.parent / "linked").summary().startswith("linked: ")


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


@pytest.mark.parametrize("ignore", ["run", ["run"], ("run",)])
def test_one_label_is_not_a_list_of_letters(folder, ignore):
    loaded = load_dataset(folder, ignore_labels=ignore)
    assert loaded.classes == ("jump",) and loaded.ignore_labels == ("run",)
    assert load_dataset(folder).ignore_labels == ("Ambiguous",)
    assert load_dataset(folder, classes="jump", ignore_labels=ignore).classes == ("jump",)


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


@pytest.mark.skipif(find_data("thumos14") is None, reason="the thumos14 data is not on this machine")
def test_thumos14_annotations_are_read_and_reported():
    thumos = read_annotations(find_data("thumos14"))
    assert (len(thumos.split("train")), len(thumos.split("test")), len(thumos.classes)) == (200, 212, 20)
    assert {kind: len(cases) for kind, cases in thumos.report.items() if cases} == {"beyond": 26}
    assert sum(case.startswith("video_test_0000270") for case in thumos.report["beyond"]) == 22
    assert len(thumos.ground_truth("train")) == 3003 and len(thumos.ground_truth("test")) == 3358 - 26


# A lenient reader: it takes down what a strict one would raise, leaves that out, and goes on.

def items(entries, name):
    return entries[name]["annotations"]


WRONG = {  # what is changed -> the kind of the problem, the item that has it, what is left of it
    "end before start": (lambda d: items(d, "b").append(annotation("run", 5, 4.5)),
                         "annotation", "video 'b', annotation 2"),
    "time in quotes": (lambda d: items(d, "c").append(annotation("run", 1, "2")),
                       "annotation", "video 'c', annotation 1"),
    "no duration": (lambda d: d["c"].pop("duration"), "video entry", "video 'c'"),
    "no subset": (lambda d: d["c"].pop("subset"), "video entry", "video 'c'"),
    "annotations are a text": (lambda d: d["c"].update(annotations="run"), "video entry", "video 'c'"),
    "no object": (lambda d: d.update(c=3), "video entry", "video 'c'"),
    "a name that leads out": (lambda d: d.update({"../x": d["c"]}), "video name", ""),
    "subsets unclear": (lambda d: d["c"].update(subset="val"), "subsets", ""),
    "no video to test on": (lambda d: [entry.update(subset="training") for entry in d.values()], "subsets", ""),
}


def leniently(path, **options):
    problems = []
    return read_annotations(path, problem=lambda *problem: problems.append(problem), **options), problems


@pytest.mark.parametrize("change, kind, item", WRONG.values(), ids=WRONG)
def test_a_lenient_reader_takes_down_what_a_strict_one_raises(folder, change, kind, item):
    edit(change)(folder)
    with pytest.raises(DataError) as caught:
        read_annotations(folder)
    found, problems = leniently(folder)
    problem = problems[0]
    assert {each[0] for each in problems} == {kind}
    assert problem[1].removeprefix(str(folder / "annotations.json")).lstrip(": ") == item
    assert str(problem[2]) == str(caught.value) and str(problem[2]).startswith(problem[1] + ": ")
    assert {video.name for video in found.videos} >= set("abde") and len(found.ground_truth(None)) >= 7


def test_a_lenient_reader_goes_through_all_mistakes_at_once(folder):
    path = folder / "annotations.json"
    path.write_text(path.read_text().replace('"c": {', '"b": {').replace('"jump"', "3"))
    found, problems = leniently(folder, classes=["fly"])
    assert [kind for kind, *_ in problems] == ["listed twice", *["annotation"] * 2, "unknown label"]
    assert found.classes == ("fly", "run") and found.splits == {"training": "train", "test": "test"}
    found, problems = leniently(folder / "none.json")
    assert [kind for kind, *_ in problems] == ["annotation file"] and not found.videos and not found.entries


def test_without_mistakes_both_readers_give_the_same(folder):
    strict, (lenient, problems) = read_annotations(folder), leniently(folder)
    assert not problems and strict.ground_truth(None).equals(lenient.ground_truth(None))
    assert strict.report == lenient.report and strict.splits == lenient.splits and strict.entries == lenient.entries


def test_of_hundreds_of_unknown_labels_twenty_are_told(folder):
    edit(lambda d: items(d, "a").extend(annotation(f"x{i}", i / 10, i / 10 + 0.05) for i in range(200)))(folder)
    found, problems = leniently(folder, classes=["run", "jump"])
    assert len(problems) == 21 and "180 more labels" in str(problems[-1][2]) and len(found.classes) == 202


# What judging takes of a file that training would refuse.

@pytest.mark.parametrize("entry", [
    {}, {"subset": 3, "duration": "9"}, {"duration": -1, "fps": "x", "annotations": None}])
def test_judging_needs_neither_subset_nor_duration(entry):
    (found,) = read_entries({"database": {"../a": entry}}, judged=True)[0].values()
    assert (found.subset, found.duration, found.fps, found.annotations) == (None, None, None, [])


@pytest.mark.parametrize("content, words", [
    ({}, "has no videos"), ({"database": [1]}, "has no videos"), ({"database": {"a": None}}, "video 'a': is None"),
    ({"database": {"a": {"annotations": 3}}}, "annotations is a int"),
    ({"database": {"a": {"annotations": False}}}, "annotations is a bool"),
    ({"database": {"a": {"annotations": {}}}}, "annotations is a dict"),
    ({"database": {"a": {"actions": [[1, 2]]}}}, "no annotations, but \"actions\"")])
def test_judging_refuses_what_has_no_list_of_annotations(content, words):
    with pytest.raises(DataError, match="the dictionary: ") as caught:
        read_entries(content, judged=True)
    assert words in str(caught.value)
