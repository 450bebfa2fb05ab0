"Evaluation against the definition written out as loops, against its own invariants, and against published figures."

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfdetr.data import DataError, find_data
from selfdetr.evaluation import PROTOCOLS, Protocol, assign, average_recall, evaluate, read_ground_truth

steady = settings(deadline=None, derandomize=True, max_examples=40)  # the same cases on every machine
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
    with pytest.raises(DataError, match=r"ground truth, row 0 .*no length"):
        evaluate(truth.assign(end=[0.0, 6.0]), found)
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
    assert sizes == {"thumos14-212": (212, 3358), "thumos14-211": (211, 3329), "thumos14-210": (210, 3311)}


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
