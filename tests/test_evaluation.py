"Evaluation against the definition written out as loops, against its own invariants, and against published figures."

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfdetr.data import DataError, find_data
from selfdetr.evaluation import (
    PROTOCOLS,
    Evaluation,
    Protocol,
    area_under,
    assign,
    average_recall,
    evaluate,
    read_durations,
    read_ground_truth,
    recall_at,
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
    with pytest.raises(DataError, match="needs the subset 'test'.*validation"):
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
