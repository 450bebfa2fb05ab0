"What counts and what is said of it: sources of any kind, protocols, subsets and names that do not meet."

import datetime
import decimal
import json
import math

import numpy as np
import pandas as pd
import pytest
from crowds import FOUND, TRUTH, as_json, crowd

from selfdetr.data.files import DataError
from selfdetr.evaluation import Evaluation, average_recall, evaluate, recall_at
from selfdetr.protocols import PROTOCOLS, Protocol, choose_protocol, read_case, read_ground_truth

truth = pd.DataFrame([("u", 0.0, 4.0, "A"), ("v", 2.0, 6.0, "B")], columns=TRUTH)
found = pd.DataFrame([("u", 0.0, 4.0, "A", 0.9), ("v", 2.0, 6.0, "B", 0.8)], columns=FOUND)


@pytest.mark.parametrize("column", ["score", "start", "end"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, "soon"])
def test_what_is_not_a_number_is_refused_by_row(column, value):
    bad = found.astype({column: object}).set_index(pd.Index(["first", "second"]))
    bad.loc["second", column] = value
    with pytest.raises(DataError, match=rf"row second .*video v.*{column} is not a finite number"):
        evaluate(truth, bad)


def test_impossible_rows_are_refused():
    with pytest.raises(DataError, match=r"detections, row 1 .*ends before"):
        evaluate(truth, found.assign(end=[4.0, 1.0]))
    with pytest.raises(DataError, match=r"ground truth, row 0 .*ends before"):
        evaluate(truth.assign(end=[-1.0, 6.0]), found)
    with pytest.raises(DataError, match="label is missing"):
        evaluate(truth.assign(label=["A", None]), found)
    with pytest.raises(DataError, match="lack the column 'score'"):
        evaluate(truth, truth)


def test_files_dictionaries_and_tables_agree(tmp_path):
    g, d = crowd(videos=5)
    dictionaries = as_json(g, "database"), as_json(d, "results")
    paths = tmp_path / "annotations.json", tmp_path / "detections.json"
    for path, content in zip(paths, dictionaries):
        path.write_text(json.dumps(content))
    expected = evaluate(g, d)
    assert expected.average > 0
    for sources in (dictionaries, paths, map(str, paths), (g, paths[1])):
        assert evaluate(*sources).per_class.equals(expected.per_class)
    named = evaluate(*paths, protocol=choose_protocol("activitynet13", "test"))
    assert named.mAP.index.tolist() == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert named.mAP[0.5] == expected.mAP[0.5] and named.protocol == "activitynet13, subset test"


def test_unusable_files_are_named(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="results.json"):
        evaluate(truth, path)
    path.write_text('{"results": {"u": [')
    with pytest.raises(DataError, match="results.json"):
        evaluate(truth, path)
    path.write_text('{"results": {"u": {}}}')
    with pytest.raises(DataError, match="results.json.*'u'"):
        evaluate(truth, path)
    with pytest.raises(DataError, match="'results' section"):
        evaluate(truth, {"database": {}})
    with pytest.raises(DataError, match=r"u\[1\].*score"):
        good = {"segment": [0, 1], "label": "A", "score": 1}
        evaluate(truth, {"results": {"u": [good, {"segment": [0, 1], "label": "A"}]}})
    with pytest.raises(DataError, match=r"u\[0\].*score nan"):
        evaluate(truth, {"results": {"u": [{"segment": [0, 1], "label": "A", "score": math.nan}]}})


def test_protocols_leave_out_videos_and_labels_on_both_sides():
    name = "video_test_0000270"
    g = pd.concat([truth, truth.assign(video=name), truth.assign(label="Ambiguous")])
    d = pd.concat([found, found.assign(video=name, start=0.0, score=3.0), found.assign(label="Ambiguous", score=3.0)])
    result = evaluate(g, d, protocol="thumos14-211")
    assert result.average == 1 and list(result.notes.values()) == [4]
    assert evaluate(g, d, protocol="thumos14-212").average < 1
    own = Protocol("own", tiou=(0.9,), drop_videos=(name,), ignore_labels=("Ambiguous",))
    assert evaluate(g, d, protocol=own).mAP.to_dict() == {0.9: 1.0}


@pytest.mark.parametrize("tiou", [0, [], (0.5, 1.5), math.nan])
def test_impossible_overlaps_are_refused(tiou):
    with pytest.raises(DataError, match="above 0 and at most 1"):
        evaluate(truth, found, tiou=tiou)


def test_unknown_protocols_and_subsets_are_refused():
    with pytest.raises(DataError, match="thumos14-212.*activitynet13"):
        evaluate(truth, found, protocol="thumos")
    with pytest.raises(DataError, match="no video is in subset 'validation'.*'test'"):
        evaluate(as_json(truth, "database"), found, protocol="activitynet13")


def test_only_the_named_videos_count():
    g, d = crowd(videos=6)
    some = evaluate(g, d, protocol=Protocol("some", videos=("1", "4")))
    assert some.average == evaluate(g[g.video.isin(["1", "4"])], d[d.video.isin(["1", "4"])]).average > 0


def test_a_case_is_judged_as_it_is_or_refused():
    case = read_case(truth, found, "thumos14-212")
    assert read_case(case) is case
    for given in ((case, found), (case, None, "thumos14-212")):
        with pytest.raises(DataError, match="a Case has detections and a protocol already"):
            read_case(*given)
    with pytest.raises(DataError, match="the detections are missing"):
        evaluate(truth)


# ---- subsets


def listed(subsets):
    "Annotations with one instance of class A in each video, from 2 to 6 s; video -> subset."
    def entry(subset):
        return {"subset": subset, "duration": 9.0, "annotations": [{"segment": [2.0, 6.0], "label": "A"}]}

    return {"database": {video: entry(subset) for video, subset in subsets.items()}}


def reported(*videos, label="A", segment=(2.0, 6.0)):
    return {"results": {video: [{"segment": list(segment), "label": label, "score": 0.5}] for video in videos}}


SPLIT = {"a": "Training", "b": "Training", "c": "Training", "d": "Validation"}


def test_videos_of_the_training_subset_do_not_count_as_missed_where_a_subset_is_chosen():
    every = evaluate(listed(SPLIT), reported("d"))
    assert every.average == 0.25
    [(note, times)] = every.notes.items()
    assert "3 of subset 'Training'" in note and "Validation" not in note and "--subset" in note and times == 3
    for name in ("validation", "Validation", "VAL", ["val"]):
        chosen = choose_protocol(None, name)
        result = evaluate(listed(SPLIT), reported("d"), protocol=chosen)
        assert result.average == 1 and result.notes == {} and result.protocol == chosen.name
        assert average_recall(listed(SPLIT), reported("d"), an=(1,), tiou=0.5, protocol=chosen).tolist() == [1]
        assert recall_at(listed(SPLIT), reported("d"), protocol=chosen).eq(1).all(axis=None)
    both = evaluate(listed(SPLIT), reported("d"), protocol=choose_protocol(None, ("training", "validation")))
    assert both.average == 0.25 and "--subset" not in str(both.notes)


def test_detections_in_videos_of_other_subsets_are_left_out_and_those_in_unknown_videos_are_wrong():
    chosen = choose_protocol(None, "validation")
    found = reported("a", "d", "unknown")
    found["results"]["unknown"][0]["score"] = 0.9
    result = evaluate(listed(SPLIT), found, protocol=chosen)
    assert result.average == 0.5 and result.notes == {
        "detections left out by the protocol": 1,
        "detections in a video without ground truth, false positives": 1,
    }
    alarm = [*evaluate(listed(SPLIT), reported("a"), protocol=chosen).notes][0]
    assert alarm == "nothing detected: all 1 detections are left out by the protocol"


def test_a_subset_that_is_not_there_is_an_error_that_names_those_that_are():
    for names, wrong in (("dev", "dev"), (("validation", "extra"), "extra")):
        with pytest.raises(DataError, match=f"subset '{wrong}'; the subsets in the file: 'Training', 'Validation'"):
            evaluate(listed(SPLIT), reported("d"), protocol=choose_protocol(None, names))
    exact = {"a": "val", "b": "validation"}  # both are there, so each means itself
    assert len(read_ground_truth(listed(exact), choose_protocol(None, "val"))) == 1


def test_an_explicit_subset_wins_over_the_protocols_own_and_the_name_says_so():
    chosen = choose_protocol("activitynet13", "training")
    assert (chosen.name, chosen.tiou) == ("activitynet13, subset training", PROTOCOLS["activitynet13"].tiou)
    assert evaluate(listed(SPLIT), reported("a", "b", "c"), protocol=chosen).average == 1
    assert choose_protocol("activitynet13") is PROTOCOLS["activitynet13"]
    with pytest.raises(DataError, match=r"choose one of thumos14-212.*\(did you mean activitynet13\?\)"):
        choose_protocol("activitynet")


def test_a_subset_in_another_unicode_form_and_one_asked_of_a_table():
    composed, decomposed = "t\u00e9", "te\u0301"
    items = [{"segment": [0, 5], "label": "x"}]
    truth = {"database": {"a": {"subset": composed, "annotations": items}, "b": {"subset": "u", "annotations": items}}}
    found = {"results": {"a": [{**items[0], "score": 1.0}]}}
    assert evaluate(truth, found, protocol=choose_protocol(None, decomposed)).average == 1
    with pytest.raises(DataError, match="no video is in subset 'tests'; .*did you mean 'test'"):
        evaluate({"database": {"a": {"subset": "test"}}}, found, protocol=choose_protocol(None, "tests"))
    table = pd.DataFrame({"video": ["a", "b"], "start": 0.0, "end": 5.0, "label": "x"})
    judged = evaluate(table, found, protocol=choose_protocol(None, "validation"))
    assert any("a table" in note or "of a table, which has none" in note for note in judged.notes)


# ---- names that do not meet


@pytest.mark.parametrize(
    "annotated, detected",
    [("x000", "v_x000"), ("v_x000", "x000"), ("video_test_0000004", "0000004"), ("Übung", "übung"), ("x000", "x_000")],
)
def test_names_without_any_in_common_are_said_first(annotated, detected):
    others = {f"other{i}": "test" for i in range(600)}
    truth = listed({**others, annotated: "test"})
    result = evaluate(truth, reported(detected))
    first = [*result.notes][0]
    assert first.startswith("nothing in common: no video") and f"'{detected}'" in first and f"'{annotated}'" in first
    assert str(result).startswith(first) and result.average == 0 and "without a detection" not in str(result.notes)
    lines = result.markdown().splitlines()
    assert lines[0].startswith("**Nothing in common: no video") and result.markdown().count("othing in common") == 1
    assert [*Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))).notes][0] == first
    with pytest.warns(UserWarning, match="nothing in common: no video"):
        average_recall(truth, reported(detected))


def test_labels_without_any_in_common_are_said_first():
    truth = listed({"a": "test"})
    first = [*evaluate(truth, reported("a", label="a")).notes][0]
    assert first == "nothing in common: no label of the detections is annotated (detected is 'a', annotated 'A'); " \
        "rename one side"
    with pytest.warns(UserWarning, match="nothing in common: no label"):
        recall_at(truth, reported("a", label="a"))
    partly = {"results": reported("a")["results"] | reported("b", label="B")["results"]}
    assert "nothing" not in str(evaluate(truth, partly))


def test_nothing_annotated_and_nothing_detected_are_said_first():
    truth = listed({"a": "test"})
    cases = {
        ("annotated",): evaluate({"database": {}}, reported("a")),
        ("detected",): evaluate(truth, {"results": {"a": []}}),
        ("annotated", "detected"): evaluate({"database": {}}, {"results": {}}),
    }
    for words, result in cases.items():
        alarms = [note for note in result.notes if note.startswith("nothing")]
        assert [note.split(":")[0] for note in alarms] == [f"nothing {word}" for word in words]
        assert [*result.notes][: len(words)] == alarms and result.markdown().startswith(f"**Nothing {words[0]}")


COMPOSED, DECOMPOSED = "\u00fcbung_1", "u\u0308bung_1"  # look alike


@pytest.mark.parametrize("annotated", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("detected", [COMPOSED, DECOMPOSED])
def test_names_in_another_unicode_form_are_matched_and_counted(annotated, detected):
    truth = listed({annotated: "test", "b": "test"})
    truth["database"][annotated]["annotations"][0]["label"] = annotated
    found = reported(detected, label=detected)
    result = evaluate(truth, found)
    assert result.per_class[0.5].to_dict() == {annotated: 1, "A": 0}
    notes = {note: times for note, times in result.notes.items() if "Unicode" in note}
    assert list(notes.values()) == [1, 1] * (annotated != detected)
    assert all(f"another Unicode form, matched ('{detected}')" in note for note in notes)
    assert len(result.notes) == len(notes) + 1  # the video b
    assert recall_at(truth, found, k=(1,), tiou=0.5).to_numpy().tolist() == [[0.5]]
    assert average_recall(truth, found, an=(1,), tiou=0.5).tolist() == [0.5]
    for name in (COMPOSED, DECOMPOSED):
        assert evaluate(truth, found, protocol=Protocol("one", videos=(name,))).average == 1
        for protocol in (Protocol("b", drop_videos=(name,)), Protocol("b", ignore_labels=(name,))):
            assert read_ground_truth(truth, protocol)["video"].tolist() == ["b"]
            assert evaluate(truth, found, protocol=protocol).notes["detections left out by the protocol"] == 1


def test_two_forms_of_one_label_are_one_class_and_two_forms_of_videos_that_are_both_annotated_stay_two():
    rows = [("u", 0.0, 4.0, COMPOSED), ("u", 5.0, 9.0, DECOMPOSED), ("u", 5.0, 9.0, COMPOSED)]
    truth = pd.DataFrame(rows, columns=TRUTH)
    found = pd.DataFrame(rows[:2], columns=TRUTH).assign(score=1.0)
    result = evaluate(truth, found, protocol=Protocol("once", duplicates=False))
    assert result.average == 1 and result.instances.to_dict() == {COMPOSED: 2}
    swapped = evaluate(truth[:2], found.assign(label=[DECOMPOSED, COMPOSED]))
    assert swapped.average == 1 and len(swapped.per_class) == 1
    both = evaluate(listed({COMPOSED: "test", DECOMPOSED: "test"}), reported(COMPOSED))
    assert both.average == 0.5


# ---- tables as pandas makes them


def in_dress(frame, dress):
    "The same table in another type, order or index. Its videos and labels are whole numbers, its times halves."
    def times(make):
        return frame.assign(**{c: make(frame[c]) for c in ("start", "end")})

    def seconds(column):
        return pd.to_timedelta(column, unit="s")

    def objects(kind):
        return lambda column: pd.Series([kind(x) for x in column], column.index, dtype=object)

    if dress == "categories":
        return frame.assign(**{c: pd.Categorical(frame[c].astype(str), list("9876543210")) for c in ("video", "label")})
    if dress == "categories of numbers":
        return frame.astype("category")
    if dress == "pyarrow":
        pytest.importorskip("pyarrow")
        return frame.convert_dtypes(dtype_backend="pyarrow")
    if dress == "bool scores":
        return frame.assign(score=frame["score"].astype(bool)) if "score" in frame else frame
    return {
        "strings": lambda: frame.astype({"video": "string", "label": str}),
        "nullable": lambda: frame.astype({"video": "Int64", "label": "Float64", "start": "Float64", "end": "Float64"}),
        "best types": lambda: frame.convert_dtypes(),
        "float names": lambda: frame.astype({"video": float, "label": "float32"}),
        "objects": lambda: frame.astype(object),
        "text": lambda: times(lambda c: c.astype(str).astype(object)),
        "numpy objects": lambda: times(objects(np.float64)).assign(video=objects(np.int64)(frame["video"])),
        "decimals": lambda: times(objects(lambda x: decimal.Decimal(str(x)))),
        "small floats": lambda: frame.astype({"start": "float32", "end": "float16"}),
        "sparse": lambda: frame.astype({"start": pd.SparseDtype(float)}),
        "time differences": lambda: times(seconds),
        "of milliseconds": lambda: times(lambda c: seconds(c).astype("timedelta64[ms]")),
        "as objects": lambda: times(objects(lambda x: datetime.timedelta(seconds=x))),
        "of numpy": lambda: times(objects(lambda x: np.timedelta64(int(1000 * x), "ms"))),
        "other columns": lambda: frame[frame.columns[::-1]].assign(extra="x", subset="training"),
        "duplicate index": lambda: frame.set_axis([0] * len(frame)),
        "named index": lambda: frame.rename_axis("video"),
        "two levels": lambda: frame.set_axis(pd.MultiIndex.from_product([["x"], [3], range(len(frame))])),
    }[dress]()


DRESSES = [
    *("categories", "categories of numbers", "strings", "nullable", "best types", "float names", "objects", "text"),
    *("numpy objects", "decimals", "small floats", "sparse", "time differences", "of milliseconds", "as objects"),
    *("of numpy", "other columns", "duplicate index", "named index", "two levels", "bool scores", "pyarrow"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dress", DRESSES)
def test_a_table_means_the_same_in_every_dress(dress):
    numbers, frames = np.random.default_rng(0), []
    for n, columns in ((40, TRUTH), (90, FOUND)):
        start = numbers.integers(0, 40, n) / 2
        values = {"video": numbers.integers(0, 4, n), "start": start, "end": start + numbers.integers(1, 9, n) / 2}
        values |= {"label": numbers.integers(4, 7, n), "score": numbers.integers(0, 2, n) * 1.0}
        frames.append(pd.DataFrame(values)[columns])
    expected = evaluate(*frames)
    assert 0.01 < expected.average < 0.99
    recall = average_recall(*frames)
    for dressed in (map(in_dress, frames, [dress] * 2), [frames[0], in_dress(frames[1], dress)],
                    [in_dress(frames[0], dress), frames[1]]):  # fmt: skip
        truth, found = dressed
        before = truth.copy(), found.copy()
        assert evaluate(truth, found).to_dict() == expected.to_dict()
        assert average_recall(truth, found).equals(recall)
        for frame, as_it_was in zip((truth, found), before):
            pd.testing.assert_frame_equal(frame, as_it_was)  # nothing is changed in place


def test_whole_numbers_meet_their_text():
    table = pd.DataFrame({"video": [1.0], "start": 2.0, "end": 6.0, "label": "A", "score": 1.0})
    assert evaluate(listed({"1": "test"}), table).average == 1
    half = evaluate(listed({"1": "test"}), table.assign(video=1.5))
    assert "detected is '1.5', annotated '1'" in [*half.notes][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.assign(start=pd.Timestamp("2024-01-01")), "detections .*start is of type datetime64.*seconds"),
        (lambda f: f.assign(end=[datetime.datetime(2024, 1, 1)] * 2), "end is of type datetime64"),
        (lambda f: f.assign(start=pd.period_range("2024", periods=2)), "start is of type period"),
        (lambda f: f.assign(start=pd.to_timedelta([1, None], unit="s")), r"row 1 .*start is not a finite number"),
        (lambda f: f.assign(score=pd.array([0.5, None], "Float64")), r"row 1 .*score is not a finite number"),
        (lambda f: f.assign(label=pd.array(["A", None], "string")), "row 1 .*the label is missing"),
        (lambda f: f.assign(label=pd.Categorical(["A", None])), "row 1 .*the label is missing"),
        (lambda f: f.set_index("video"), r"lack the column 'video'.*in the index.*reset_index"),
        (lambda f: pd.concat([f, f[["label"]]], axis=1), "have 2 columns named 'label'"),
        (lambda f: f.set_axis(pd.MultiIndex.from_tuples([("x",)] * 2)).assign(end=-1.0), "ends before it starts"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_error(change, message):
    with pytest.raises(DataError, match=message):
        evaluate(truth, change(found))


def test_one_name_in_a_protocol_is_not_a_list_of_letters():
    one = Protocol("x", subsets="test", videos="u", drop_videos="v", ignore_labels="Ambiguous")
    assert one == Protocol("x", subsets=("test",), videos=("u",), drop_videos=("v",), ignore_labels=("Ambiguous",))
    assert Protocol("x", videos=["u", "v"]).videos == ("u", "v")


@pytest.mark.parametrize("segment", ["12", b"12", {1: 2.0, 3: 4.0}, {2.0, 3.0}, None])
def test_a_segment_of_another_kind_is_refused_with_its_place(segment):
    good = {"segment": np.array([0.0, 1.0]), "label": "A", "score": 1}
    with pytest.raises(DataError, match=r"u\[1\] is .*: it needs segment, label, score"):
        evaluate(truth, {"results": {"u": [good, good | {"segment": segment}]}})
