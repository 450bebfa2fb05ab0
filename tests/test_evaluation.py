"Evaluation against the definition written out as loops, against its own invariants, and against published figures."

import datetime
import decimal
import html
import io
import dataclasses
import json
import math
import re
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfdetr import evaluation
from selfdetr.data import DataError, find_data
from selfdetr.evaluation import (
    PROTOCOLS,
    Evaluation,
    Protocol,
    area_under,
    assign,
    average_recall,
    choose_protocol,
    drawn,
    evaluate,
    markdown_table,
    read_durations,
    read_ground_truth,
    recall_at,
    use_fallbacks,
)

steady = settings(derandomize=True, max_examples=40)  # the same cases on every machine
TIOU = (0.1, 0.3, 0.5, 0.75, 1.0)
TRUTH, FOUND = ["video", "start", "end", "label"], ["video", "start", "end", "label", "score"]


def overlap(a, b):
    shared = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    covered = (a.end - a.start) + (b.end - b.start) - shared
    return shared / covered if covered > 0 else 0.0


def slow_hits(truth, found, tiou):
    "Hits of one class by descending score; `sorted` is stable, so equal scores keep the order of the table."
    used, hits = set(), []
    for d in sorted(found.itertuples(), key=lambda d: -d.score):
        best, best_iou = None, -1.0
        for i, g in enumerate(truth.itertuples()):
            if g.video == d.video and i not in used and overlap(d, g) >= tiou and overlap(d, g) > best_iou:
                best, best_iou = i, overlap(d, g)
        used.add(best)
        hits.append(best is not None)
    return hits


def slow_ap(truth, found, tiou):
    "Area under the interpolated precision-recall curve, as a sum of rectangles between successive recalls."
    points, right = [], 0
    for n, hit in enumerate(slow_hits(truth, found, tiou), 1):
        right += hit
        points.append((right / len(truth), right / n))
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


def slow_recall(truth, found, n, tiou):
    total = 0
    for g in truth.itertuples():
        in_video = sorted((d for d in found.itertuples() if d.video == g.video), key=lambda d: -d.score)[:n]
        total += sum(any(overlap(d, g) >= t for d in in_video) for t in tiou)
    return total / (len(truth) * len(tiou))


@st.composite
def results(draw, distinct=False):
    "Ground truth and detections on a grid of whole seconds, where overlaps and scores often tie."
    n, m = draw(st.integers(1, 8)), draw(st.integers(0, 16))
    place = st.tuples(st.sampled_from("uvw"), st.integers(0, 10), st.integers(1, 6), st.sampled_from("AB"))
    guess = st.tuples(st.sampled_from("uvwx"), st.integers(0, 10), st.integers(0, 6), st.sampled_from("ABC"))
    score = st.integers(0, 1000 if distinct else 8).map(lambda s: s / 10)
    truth = [(v, float(s), float(s + w), c) for v, s, w, c in draw(st.lists(place, min_size=n, max_size=n))]
    found = [(v, float(s), float(s + w), c) for v, s, w, c in draw(st.lists(guess, min_size=m, max_size=m))]
    scores = draw(st.lists(score, min_size=m, max_size=m, unique=distinct))
    return pd.DataFrame(truth, columns=TRUTH), pd.DataFrame(found, columns=TRUTH).assign(score=scores)[FOUND]


def crowd(seed=0, videos=30, classes=5, per_video=40):
    "A plausible detector: instances found with jitter, repeats, noise elsewhere and confused classes."
    rng = np.random.default_rng(seed)
    n = videos * 8
    start = rng.uniform(0, 100, n)
    truth = pd.DataFrame({"video": rng.integers(0, videos, n), "start": start, "end": start + rng.lognormal(1, 0.6, n)})
    truth["label"] = rng.integers(0, classes, n)
    picked = truth.iloc[rng.integers(0, n, videos * per_video)].reset_index(drop=True)
    jitter = rng.normal(0, 0.6, (len(picked), 2))
    found = picked.assign(start=picked["start"] + jitter[:, 0], end=picked["end"] + jitter[:, 1])
    wrong = rng.random(len(found)) < 0.3
    found.loc[wrong, "label"] = rng.integers(0, classes, wrong.sum())
    found["end"] = np.maximum(found["start"], found["end"])
    found["score"] = rng.random(len(found))
    return truth, found


@given(results())
@steady
def test_ap_equals_the_definition(case):
    truth, found = case
    result = evaluate(truth, found, tiou=TIOU)
    for label, values in result.per_class.iterrows():
        own = found[found["label"] == label]
        expected = [slow_ap(truth[truth["label"] == label], own, t) for t in TIOU]
        assert np.allclose(values, expected, atol=1e-12)
    assert set(result.per_class.index) == set(truth["label"])
    assert np.allclose(result.mAP, result.per_class.to_numpy().mean(0))
    assert math.isclose(result.average, result.per_class.to_numpy().mean(), abs_tol=1e-12)


def test_ap_equals_the_definition_for_many_detections():
    truth, found = crowd()
    result = evaluate(truth, found, tiou=TIOU[:4])
    for label, values in result.per_class.iterrows():
        mine = [frame[frame["label"].astype(str) == label] for frame in (truth, found)]
        assert np.allclose(values, [slow_ap(*mine, t) for t in TIOU[:4]], atol=1e-12)


@given(results())
@steady
def test_each_instance_is_claimed_once_and_only_by_its_own_kind(case):
    truth, found = case
    claimed = assign(truth, found, TIOU)
    for t, row in zip(TIOU, claimed):
        taken = row[row >= 0]
        assert len(set(taken.tolist())) == len(taken)
        for d, g in zip(found[row >= 0].itertuples(), truth.iloc[taken].itertuples()):
            assert (d.video, d.label) == (g.video, g.label) and overlap(d, g) >= t


@given(results(distinct=True), st.randoms(use_true_random=False))
@steady
def test_the_order_of_the_tables_does_not_matter(case, random):
    truth, found = case
    order = random.sample(range(len(found)), len(found))
    base = evaluate(truth, found, tiou=TIOU)
    assert evaluate(truth, found.iloc[order], tiou=TIOU).per_class.equals(base.per_class)


def test_the_order_of_the_ground_truth_does_not_matter():
    truth, found = crowd()
    assert evaluate(truth.sample(frac=1, random_state=0), found).per_class.equals(evaluate(truth, found).per_class)


@given(results())
@steady
def test_ap_never_rises_with_tiou(case):
    # Whoever claims at the higher tIoU would claim at the lower one too, so the hits come no later there.
    values = evaluate(*case, tiou=np.linspace(0.05, 1, 20)).per_class.to_numpy()
    assert (np.diff(values, axis=1) <= 1e-12).all()


@given(results(), st.floats(0.01, 100), st.sampled_from([0.5, 2.0, 1024.0]))
@steady
def test_units_of_score_and_time_do_not_matter(case, score_unit, time_unit):
    truth, found = case
    assume(len(found))
    scaled = [f.assign(start=f["start"] * time_unit, end=f["end"] * time_unit) for f in (truth, found)]
    scaled[1]["score"] = np.arctan(scaled[1]["score"] * score_unit) - 5
    assume(scaled[1]["score"].nunique() == found["score"].nunique())
    assert evaluate(*scaled, tiou=TIOU).per_class.equals(evaluate(truth, found, tiou=TIOU).per_class)


@given(results())
@steady
def test_perfect_detections_reach_one_and_worthless_ones_after_them_cost_nothing(case):
    truth, found = case
    perfect = truth.drop_duplicates().assign(score=2.0)
    every = pd.concat([perfect, found.assign(score=found["score"] - 1e6)])
    assert evaluate(truth.drop_duplicates(), every, tiou=(0.5, 1.0)).per_class.eq(1).all(axis=None)


@pytest.mark.filterwarnings("ignore:nothing in common")
@given(results())
@steady
def test_average_recall_equals_the_definition(case):
    truth, found = case
    recall = average_recall(truth, found, an=(1, 2, 5, 100), tiou=TIOU)
    assert np.allclose(recall, [slow_recall(truth, found, n, TIOU) for n in (1, 2, 5, 100)], atol=1e-12)
    assert (np.diff(recall) >= 0).all()


truth = pd.DataFrame([("u", 0.0, 4.0, "A"), ("v", 2.0, 6.0, "B")], columns=TRUTH)
found = pd.DataFrame([("u", 0.0, 4.0, "A", 0.9), ("v", 2.0, 6.0, "B", 0.8)], columns=FOUND)


def test_empty_tables_have_explicit_values():
    for g, d in [(truth, found.iloc[:0]), (truth.iloc[:0], found), (truth.iloc[:0], found.iloc[:0])]:
        result = evaluate(g, d)
        assert result.average == 0 and result.mAP.tolist() == [0] * 5
        assert result.per_class.shape == (g["label"].nunique(), 5) and not result.per_class.isna().any(axis=None)
        assert average_recall(g, d).tolist() == [0] * 5
    assert evaluate({"database": {}}, {"results": {}}).average == 0


def test_a_class_only_in_the_detections_changes_nothing_but_is_counted():
    stray = pd.concat([found, found.assign(label="C", score=5.0)])
    result = evaluate(truth, stray)
    assert result.per_class.equals(evaluate(truth, found).per_class) and result.average == 1
    assert list(result.notes.values()) == [2]


def test_detections_where_nothing_happens_are_false_positives():
    result = evaluate(truth, pd.concat([found, found.assign(video="x", score=5.0)]))
    assert result.average == 0.5 and list(result.notes.values()) == [2]


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


def as_json(frame, section):
    items = {v: [] for v in frame["video"]}
    for row in frame.to_dict("records"):
        items[row.pop("video")].append({"segment": [row.pop("start"), row.pop("end")], **row})
    if section == "database":
        items = {v: {"subset": "validation", "duration": 9.0, "annotations": a} for v, a in items.items()}
    return {section: items}


def test_files_dictionaries_and_tables_agree(tmp_path):
    g, d = crowd(videos=5)
    g, d = g.astype({"video": str, "label": str}), d.astype({"video": str, "label": str})
    dictionaries = as_json(g, "database"), as_json(d, "results")
    paths = tmp_path / "annotations.json", tmp_path / "detections.json"
    for path, content in zip(paths, dictionaries):
        path.write_text(json.dumps(content))
    expected = evaluate(g, d)
    assert expected.average > 0
    for sources in (dictionaries, paths, map(str, paths), (g, paths[1])):
        assert evaluate(*sources).per_class.equals(expected.per_class)
    named = evaluate(*paths, protocol="activitynet13")
    assert named.mAP.index.tolist() == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert named.mAP[0.5] == expected.mAP[0.5] and named.protocol == "activitynet13"


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
    with pytest.raises(DataError, match="no video is in subset 'test'.*validation"):
        evaluate(as_json(truth, "database"), found, protocol="thumos14-212")


def test_thumos14_protocols_have_their_published_sizes():
    folder = find_data("thumos14")
    if folder is None:
        pytest.skip("the THUMOS14 annotations are not here")
    names = [name for name in PROTOCOLS if name.startswith("thumos14")]
    frames = {name: read_ground_truth(folder / "annotations.json", name) for name in names}
    sizes = {name: (frame["video"].nunique(), len(frame)) for name, frame in frames.items()}
    challenge = {"thumos14-challenge": (212, 3358)}
    assert sizes == {"thumos14-212": (212, 3358), "thumos14-211": (211, 3329), "thumos14-210": (210, 3311), **challenge}


@pytest.mark.parametrize("as_tables", [False, True])
def test_published_map_digit_for_digit(as_tables):
    folder = find_data("detections")
    if folder is None:
        pytest.skip("the released detections with their published mAP are not here")
    parts = "published", "ground_truth", "detections"
    published, truth, found = (json.loads((folder / f"autoloc_thumos14_{part}.json").read_text()) for part in parts)
    if as_tables:
        items = [(v, *a["segment"], a["label"]) for v, e in truth["database"].items() for a in e["annotations"]]
        truth = pd.DataFrame(items, columns=TRUTH)
        items = [(v, *a["segment"], a["label"], a["score"]) for v, e in found["results"].items() for a in e]
        found = pd.DataFrame(items, columns=FOUND).sample(frac=1, random_state=0)
    result = evaluate(truth, found, tiou=published["tiou"])
    assert [f"{v:.3f}" for v in result.mAP] == [f"{v:.3f}" for v in published["mAP"]]
    assert f"{result.average:.3f}" == f"{published['average']:.3f}"


# ---- the rule of the THUMOS'14 challenge


def slow_challenge(truth, found, ambiguous, tiou):
    "AP of one class: instances choose in their order, precision as it is, the ambiguous passed over."
    ranked = sorted(found.itertuples(), key=lambda d: -d.score)
    taken = set()
    for g in truth.itertuples():
        able = [(overlap(g, d), -i) for i, d in enumerate(ranked) if d.video == g.video and i not in taken]
        if able and max(able)[0] > tiou:
            taken.add(-max(able)[1])
    total, right, counted = 0.0, 0, 0
    for i, d in enumerate(ranked):
        unsure = any(a.video == d.video and overlap(a, d) > 0 for a in ambiguous.itertuples())
        if i in taken or not unsure:
            counted += 1
        if i in taken:
            right += 1
            total += right / counted
    return total / len(truth)


@steady
@given(results(), results())
def test_the_challenge_rule_equals_its_definition(case, other):
    (truth, found), ambiguous = case, other[0].head(2).assign(label="Ambiguous")
    protocol = Protocol("own", TIOU[:-1], ignore_labels=("Ambiguous",), rule="thumos14")
    result = evaluate(pd.concat([truth, ambiguous]), found, protocol=protocol)
    for label, ap in result.per_class.iterrows():
        mine = truth[truth.label == label], found[found.label == label], ambiguous
        assert ap.tolist() == pytest.approx([slow_challenge(*mine, t) for t in TIOU[:-1]], abs=1e-12)


def test_the_two_rules_differ_where_they_should():
    truth = pd.DataFrame([("v", 0.0, 10.0, "A")], columns=TRUTH)
    found = pd.DataFrame([("v", 0.0, 5.0, "A", 0.9), ("v", 0.0, 10.0, "A", 0.8)], columns=FOUND)
    today, then = Protocol("today", (0.5,)), Protocol("then", (0.5,), rule="thumos14")
    assert evaluate(truth, found, protocol=today).average == 1.0  # an overlap of exactly 0.5 is enough, and comes first
    assert evaluate(truth, found, protocol=then).average == 0.5  # it is not, and the second is taken
    with pytest.raises(DataError, match="'own' has the rule 'voc': choose one of activitynet, thumos14"):
        Protocol("own", rule="voc")
    with pytest.raises(DataError, match="above 0 and at most 1"):
        Protocol("own", tiou=(50,))


# ---- recall


def slow_recall_at(truth, found, k, tiou):
    by_class = []
    for label, mine in truth.groupby("label"):
        right = 0
        for g in mine.itertuples():
            tries = k * sum(o.video == g.video for o in mine.itertuples())
            in_video = (d for d in found.itertuples() if (d.video, d.label) == (g.video, label))
            best = sorted(in_video, key=lambda d: -d.score)[:tries]
            right += any(overlap(d, g) >= tiou for d in best)
        by_class.append(right / len(mine))
    return sum(by_class) / len(by_class)


@pytest.mark.filterwarnings("ignore:nothing in common")
@steady
@given(results())
def test_recall_at_equals_the_definition(case):
    truth, found = case
    result = recall_at(truth, found, k=(1, 2, 5), tiou=TIOU)
    for k in (1, 2, 5):
        assert result[f"{k}x"].tolist() == pytest.approx([slow_recall_at(truth, found, k, t) for t in TIOU])
    assert (result.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)  # more tries never find less


def test_the_area_under_the_curve_of_a_perfect_and_a_blind_detector():
    found = truth.assign(score=1.0)
    assert area_under(average_recall(truth, found, an=range(1, 101))) == pytest.approx(0.99)  # it starts at one
    assert area_under(average_recall(truth, found[:0], an=range(1, 101))) == 0


# ---- what is unusual is counted and said


def test_oddities_count_as_they_are_and_are_noted():
    annotated = as_json(truth, "database")
    video = truth.video[0]
    annotated["database"][video]["annotations"] += [
        {"segment": [5.0, 5.0], "label": "A"},
        {"segment": [8.0, 9.5], "label": "A"},
        {"segment": [8.0, 9.5], "label": "A"},
    ]
    odd = pd.DataFrame([(video, 7.0, 7.0, "A", 0.1), (video, 8.0, 9.5, "A", 0.1)], columns=FOUND)
    result = evaluate(annotated, pd.concat([found, odd]))
    assert {note.split(",")[0]: times for note, times in result.notes.items()} == {
        "instances that reach beyond their video": 2,
        "detections that reach beyond their video": 1,
        "instances of no length": 1,
        "detections of no length": 1,
        "instances annotated twice": 1,
    }
    assert result.instances.to_dict() == {"A": 4, "B": 1} and not result.per_class.isna().any(axis=None)
    once = evaluate(annotated, found, protocol=Protocol("once", duplicates=False))
    assert once.instances["A"] == 3 and "instances annotated twice, both counted" not in once.notes
    assert set(read_durations(annotated).values()) == {9.0} and read_durations(truth) == {}


def test_only_the_named_videos_count():
    g, d = crowd(videos=6)
    g, d = g.astype({"video": str, "label": str}), d.astype({"video": str, "label": str})
    some = evaluate(g, d, protocol=Protocol("some", videos=("1", "4")))
    assert some.average == evaluate(g[g.video.isin(["1", "4"])], d[d.video.isin(["1", "4"])]).average > 0


def test_a_result_survives_json_and_is_readable(tmp_path):
    result = evaluate(*crowd(videos=5), tiou=(0.3, 0.35, 1 / 3))
    again = Evaluation.from_dict(json.loads(result.save(tmp_path / "result.json").read_text()))
    assert again.to_dict() == result.to_dict() and str(again) == str(result)
    pd.testing.assert_frame_equal(again.per_class, result.per_class, check_exact=True)
    pd.testing.assert_series_equal(again.mAP, result.mAP, check_exact=True)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    lines = result.markdown(per_class=True).splitlines()
    assert lines[0] == "Protocol all." and len([line for line in lines if line.startswith("|")]) == 2 + 1 + 5
    assert result.table().loc["all classes", "average"] == round(100 * result.average, 2)
    empty = evaluate(truth[:0], found[:0])
    assert "| all classes | 0.0" in empty.markdown() and Evaluation.from_dict(empty.to_dict()).average == 0
    result.plot()
    empty.plot()
    for wrong in ({}, {"mAP": 3}, result.to_dict() | {"per_class": {"A": {}}}):
        with pytest.raises(DataError, match="not the result of an evaluation"):
            Evaluation.from_dict(wrong)


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


# ---- text


HOSTILE = ["either|or", "a\\|b", "$5 and $6", "$\\frac{1}$", "two\nlines", "tab\tbed", "<unk>", "\u00fcbung", "ends\\"]


def test_markdown_shows_names_as_they_are():
    mistune = pytest.importorskip("mistune")
    frame = pd.DataFrame({name: range(len(HOSTILE)) for name in HOSTILE}, pd.Index(HOSTILE, name="a|b"))
    page = mistune.create_markdown(plugins=["table"])(markdown_table(frame))
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)]
    assert len(cells) == (len(HOSTILE) + 1) ** 2 and cells[0] == "a|b"
    wanted = [" ".join(name.splitlines()) for name in HOSTILE]
    assert cells[1 : len(HOSTILE) + 1] == cells[len(HOSTILE) + 1 :: len(HOSTILE) + 1] == wanted
    assert markdown_table(frame).count("$") == markdown_table(frame).count(r"\$")


@pytest.mark.filterwarnings("error")
def test_pictures_show_names_as_they_are():
    rows = pd.DataFrame([("u", 0.0, 4.0, name) for name in HOSTILE], columns=TRUTH)
    figure = evaluate(rows, rows.assign(score=1.0), protocol=Protocol("$x^{ and $y")).plot()
    figure.savefig(io.BytesIO())
    right = figure.axes[1]
    names = [label.get_text().replace(r"\$", "$") for label in right.get_yticklabels()]
    assert sorted(names) == sorted(" ".join(name.split()) for name in HOSTILE)
    assert "$x^{ and $y" in right.get_title().replace(r"\$", "$")
    plt.close(figure)


def test_letters_without_a_font_give_one_warning_and_those_of_a_fallback_are_drawn(monkeypatch):
    with monkeypatch.context() as only:
        only.setattr(evaluation, "FALLBACKS", ())
        rows = pd.DataFrame([("u", 0.0, 4.0, "\u8df3\u9ad8"), ("u", 0.0, 4.0, "\u8df3\u9060")], columns=TRUTH)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            figure = evaluate(rows, rows.assign(score=1.0)).plot()
            figure.savefig(io.BytesIO())
    assert len(said) == 1 and "no font here" in str(said[0].message)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["\u25a1\u25a1"] * 2
    monkeypatch.setattr(evaluation, "FALLBACKS", ("STIXNonUnicode", "no such font"))  # comes with matplotlib
    letter = chr(min(evaluation._drawable(("STIXNonUnicode",)) - evaluation._drawable(("sans-serif",))))
    figure, ax = plt.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.set_title(drawn(letter))
        use_fallbacks(ax)
        figure.savefig(io.BytesIO())
    assert ax.get_title() == letter and "STIXNonUnicode" in ax.title.get_fontfamily()
    plt.close("all")


def test_the_area_under_the_curve_needs_nothing_of_a_new_numpy(monkeypatch):
    monkeypatch.delattr(np, "trapezoid", raising=False)
    assert area_under(pd.Series([0.0, 0.5, 1.0], index=[1, 2, 4])) == (0.25 + 1.5) / 4


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
    assert r"Protocol a\|b." in dataclasses.replace(judged, protocol="a|b").markdown()
