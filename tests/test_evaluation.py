"Evaluation against the definition written out as loops, against its own invariants, and against published figures."

import dataclasses
import io
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from crowds import FOUND, TRUTH, as_json, by_score, crowd, overlap, results, steady
from hypothesis import assume, given
from hypothesis import strategies as st

from selfdetr.data.files import DataError, find_data
from selfdetr.evaluation import Evaluation, area_under, assign, average_recall, evaluate, plot_evaluation, recall_at
from selfdetr.protocols import Protocol, read_case

TIOU = (0.1, 0.3, 0.5, 0.75, 1.0)
truth = pd.DataFrame([("u", 0.0, 4.0, "A"), ("v", 2.0, 6.0, "B")], columns=TRUTH)
found = pd.DataFrame([("u", 0.0, 4.0, "A", 0.9), ("v", 2.0, 6.0, "B", 0.8)], columns=FOUND)


def slow_hits(truth, found, tiou):
    "Hits of one class, best first."
    used, hits = set(), []
    for _, d in by_score(found):
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
        in_video = [d for _, d in by_score(found) if d.video == g.video][:n]
        total += sum(any(overlap(d, g) >= t for d in in_video) for t in tiou)
    return total / (len(truth) * len(tiou))


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
    # A detection that claims at the higher tIoU would claim at the lower one too, so the hits come no later there.
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


@given(results(shortest=1))
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


def test_published_map_digit_for_digit_from_shuffled_tables():
    folder = find_data("detections")
    if folder is None:
        pytest.skip("the released detections with their published mAP are not here")
    parts = "published", "ground_truth", "detections"
    published, truth, found = (json.loads((folder / f"autoloc_thumos14_{part}.json").read_text()) for part in parts)
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
    ranked = [d for _, d in by_score(found)]
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
    by_class, ranked = {}, [d for _, d in by_score(found)]
    for g in truth.itertuples():
        tries = k * sum((o.video, o.label) == (g.video, g.label) for o in truth.itertuples())
        best = [d for d in ranked if (d.video, d.label) == (g.video, g.label)][:tries]
        by_class.setdefault(g.label, []).append(any(overlap(d, g) >= tiou for d in best))
    return np.mean([np.mean(recalled) for recalled in by_class.values()])


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
    annotated = as_json(truth, "database", duration=9.0)
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
    assert read_case(annotated, found).durations == {"u": 9.0, "v": 9.0} and read_case(truth, found).durations == {}


def test_a_result_survives_json_and_is_readable():
    result = evaluate(*crowd(videos=5), tiou=(0.3, 0.35, 1 / 3))
    again = Evaluation.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict() and str(again) == str(result)
    pd.testing.assert_frame_equal(again.per_class, result.per_class, check_exact=True)
    pd.testing.assert_series_equal(again.mAP, result.mAP, check_exact=True)
    assert r"Protocol a\|b." in dataclasses.replace(result, protocol="a|b").markdown()
    lines = result.markdown(per_class=True).splitlines()
    assert lines[0] == "Protocol all." and len([line for line in lines if line.startswith("|")]) == 2 + 1 + 4
    assert result.table().loc["all classes", "average"] == round(100 * result.average, 2)
    empty = evaluate(truth[:0], found[:0])
    assert "| all classes | 0.0" in empty.markdown() and Evaluation.from_dict(empty.to_dict()).average == 0
    for drawable in (result, empty):
        plt.close(plot_evaluation(drawable))
    for wrong in ({}, {"mAP": 3}, result.to_dict() | {"per_class": {"A": {}}}):
        with pytest.raises(DataError, match="not the result of an evaluation"):
            Evaluation.from_dict(wrong)


HOSTILE = ["either|or", "$5 and $6", "$\\frac{1}$", "two\nlines", "tab\tbed", "\u00fcbung", "ends\\"]


@pytest.mark.filterwarnings("error")
def test_pictures_show_names_as_they_are():
    rows = pd.DataFrame([("u", 0.0, 4.0, name) for name in HOSTILE], columns=TRUTH)
    figure = plot_evaluation(evaluate(rows, rows.assign(score=1.0), protocol=Protocol("$x^{ and $y")))
    figure.savefig(io.BytesIO())
    right = figure.axes[1]
    names = [label.get_text().replace(r"\$", "$") for label in right.get_yticklabels()]
    assert sorted(names) == sorted(" ".join(name.split()) for name in HOSTILE)
    assert "$x^{ and $y" in right.get_title().replace(r"\$", "$")
    plt.close(figure)


def test_the_area_under_the_curve_needs_nothing_of_a_new_numpy(monkeypatch):
    monkeypatch.delattr(np, "trapezoid", raising=False)
    assert area_under(pd.Series([0.0, 0.5, 1.0], index=[1, 2, 4])) == (0.25 + 1.5) / 4
