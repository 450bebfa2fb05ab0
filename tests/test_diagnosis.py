"The diagnosis against its definitions written out as loops, against its own invariants."

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from crowds import FOUND, TRUTH, as_json, by_score, crowd, overlap, results, steady
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from selfdetr.data import files
from selfdetr.data.files import DataError
from selfdetr.diagnosis import (
    ERROR_KINDS, bucket_limits, characteristics, diagnose, error_kinds, group_instances, normalised_ap,
    plot_diagnosis, shift_back, time_shifts)
from selfdetr.evaluation import average_precision, average_recall, evaluate, recall_at
from selfdetr.protocols import Protocol, read_case

TIOU = (0.05, 0.3, 0.5, 1.0)
DURATIONS = {"u": 20.0, "v": 25.0, "w": 40.0}


def slow_claims(truth, found, tiou):
    "What each detection claims, by position; `sorted` is stable, so equal scores keep the order of the table."
    used, claims = set(), {}
    for i, d in by_score(found):
        best, best_iou = None, -1.0
        for j, g in enumerate(truth.itertuples()):
            iou = overlap(d, g)
            if (g.video, g.label) == (d.video, d.label) and j not in used and iou >= tiou and iou > best_iou:
                best, best_iou = j, iou
        if best is not None:
            used.add(best)
            claims[i] = best
    return claims


def slow_kinds(truth, found, tiou):
    "The name of the kind of each detection, by asking for each kind whether any instance makes it that."
    claims, kinds = slow_claims(truth, found, tiou), []
    for i, d in enumerate(found.itertuples()):
        in_video = [g for g in truth.itertuples() if g.video == d.video]
        own = [overlap(d, g) for g in in_video if g.label == d.label]
        other = [overlap(d, g) for g in in_video if g.label != d.label]
        if i in claims:
            kinds.append("true positive")
        elif any(iou >= tiou for iou in own):
            kinds.append("double detection")
        elif any(iou >= tiou for iou in other):
            kinds.append("wrong label")
        elif any(0.1 <= iou < tiou for iou in own):
            kinds.append("localisation")
        elif any(0.1 <= iou < tiou for iou in other):
            kinds.append("confusion")
        else:
            kinds.append("background")
    return kinds


def slow_profile(truth, found, tiou, k):
    "How many of each kind are among the k times G best detections of each class with G instances."
    kinds, counts = slow_kinds(truth, found, tiou), dict.fromkeys(ERROR_KINDS, 0)
    for label in set(truth["label"]):
        ranked = [i for i, d in by_score(found) if d.label == label]
        for i in ranked[: k * sum(truth["label"] == label)]:
            counts[kinds[i]] += 1
    return counts


def slow_characteristics(truth):
    "Length, coverage, instances and context, the context by counting whole seconds."
    rows = []
    for g in truth.itertuples():
        length = int(g.end - g.start)
        around = [*range(int(g.start) - length, int(g.start)), *range(int(g.end), int(g.end) + length)]
        others = [o for o in truth.itertuples() if o.video == g.video]
        free = [s for s in around if not any(o.start <= s < o.end for o in others)]
        same = sum(o.label == g.label for o in others)
        rows.append((length, length / DURATIONS[g.video], same, len(free) / len(around) if around else 1))
    return pd.DataFrame(rows, columns=["length", "coverage", "instances", "context"])


def slow_map_n(truth, found, claims, inside):
    "mAP_N of the instances whose positions are in `inside`, as rectangles under the precision at each recall."
    values = []
    normal = len(truth) / truth["label"].nunique()
    for label in sorted(set(truth["label"])):
        positives = sum(label == truth["label"].iloc[j] for j in inside)
        points, hits, errors = [(0.0, 0.0)], 0, 0
        for i, d in by_score(found):
            if d.label != label or (i in claims and claims[i] not in inside):
                continue
            hits, errors = hits + (i in claims), errors + (i not in claims)
            recall = hits / positives if positives else 0.0
            points.append((recall, recall * normal / (recall * normal + errors)))
        recalls = sorted({r for r, _ in points})
        steps = zip(recalls[1:], recalls)
        if positives:
            values.append(sum((r - before) * max(p for q, p in points if q >= r) for r, before in steps))
    return sum(values) / len(values) if values else 0.0


def tables_equal(a, b):
    for name, frame in a.tables.items():
        pd.testing.assert_frame_equal(frame, b.tables[name], check_exact=False, atol=1e-12, rtol=0)
    pd.testing.assert_series_equal(a.mAP, b.mAP)
    return True


@given(results())
@steady
def test_kinds_equal_their_definition(case):
    kinds = error_kinds(*case, TIOU)
    assert kinds.shape == (len(TIOU), len(case[1])) and set(kinds.flat) <= set(range(len(ERROR_KINDS)))
    for t, row in zip(TIOU, kinds):
        assert [ERROR_KINDS[i] for i in row] == slow_kinds(*case, t)


def test_kinds_of_many_detections_equal_their_definition_and_all_occur():
    truth, found = crowd(videos=8)
    kinds = error_kinds(truth, found, (0.3, 0.5))
    for t, row in zip((0.3, 0.5), kinds):
        assert [ERROR_KINDS[i] for i in row] == slow_kinds(truth, found, t)
        assert set(row) == set(range(len(ERROR_KINDS)))


def test_tious_below_the_limit_for_being_near():
    g = pd.DataFrame([("u", 0.0, 10.0, "A")], columns=TRUTH)
    far = pd.DataFrame({"video": "u", "start": 9.0, "end": 19.0, "label": list("AAB"), "score": [3, 2, 1]})  # IoU 1/19
    names = [[ERROR_KINDS[i] for i in row] for row in error_kinds(g, far, (0.05, 0.06))]
    assert names == [["true positive", "double detection", "wrong label"], ["background"] * 3]


@given(results(), st.sampled_from([0.3, 0.5, 1.0]))
@steady
def test_the_profile_equals_its_definition_and_the_kinds_partition_the_detections(case, tiou):
    truth, found = case
    profile = diagnose(truth, found, profile_tiou=tiou).false_positives
    for k in (1, 2, 10):
        counts = slow_profile(truth, found, tiou, k)
        assert profile.loc[k, "detections"] == sum(counts.values())
        assert np.allclose(profile.loc[k, list(ERROR_KINDS)] * max(sum(counts.values()), 1), list(counts.values()))
    assert np.allclose(profile[list(ERROR_KINDS)].sum(axis=1), profile["detections"] > 0)


def check_impact(truth, found, levels):
    "Compare with an evaluation of what is left; the largest gain."
    impact = diagnose(truth, found, tiou=levels).impact
    for t in levels:
        kinds = np.array(slow_kinds(truth, found, t), object)
        before, only_hits = (evaluate(truth, d, tiou=t).average for d in (found, found[kinds == "true positive"]))
        for kind in ERROR_KINDS[1:]:
            gained = evaluate(truth, found[kinds != kind], tiou=t).average - before if kind in kinds else 0
            assert math.isclose(impact.loc[kind, t], gained, abs_tol=1e-12)
        assert math.isclose(impact.loc["all five", t], only_hits - before, abs_tol=1e-12)
        assert math.isclose(impact.loc["missed instances", t], 1 - only_hits, abs_tol=1e-12)
    assert (impact.to_numpy() >= -1e-12).all()  # no error ever helps
    assert np.allclose(impact["average"], impact[list(levels)].mean(axis=1))
    return impact


@given(results(), st.sampled_from([0.05, 0.5]))
@steady
def test_impact_equals_evaluating_again_without_those_errors(case, tiou):
    check_impact(*case, (tiou,))


def test_impact_on_many_detections():
    impact = check_impact(*crowd(videos=8), (0.3, 0.5))
    assert (impact > 0).all(axis=None)


@given(results())
@steady
def test_sensitivity_and_false_negatives_equal_their_definition(case):
    truth, found = case
    result = diagnose(truth, found, tiou=TIOU, durations=DURATIONS)
    measured = slow_characteristics(truth)
    pd.testing.assert_frame_equal(characteristics(truth, DURATIONS), measured, check_dtype=False)
    inside = {("all", "all"): set(range(len(truth)))}
    for name in measured:
        limits = (*bucket_limits(measured[name].to_numpy(), name), math.inf)
        for size, low, high in zip(("XS", "S", "M", "L", "XL"), (-math.inf, *limits), limits):
            inside[name, size] = {j for j, v in enumerate(measured[name]) if low < round(v, 9) <= high}
    assert list(result.sensitivity.index) == list(inside)
    claims = {t: slow_claims(truth, found, t) for t in TIOU}
    claimed = set(claims[0.5].values())
    for key, members in inside.items():
        assert result.sensitivity.loc[key, "instances"] == len(members)
        expected = np.mean([slow_map_n(truth, found, claims[t], members) for t in TIOU])
        assert math.isclose(result.sensitivity.loc[key, "mAP_N"], expected, abs_tol=1e-12)
        share = len(members - claimed) / len(members) if members else 0
        assert math.isclose(result.false_negatives.loc[key, "missed"], share)


@given(results())
@steady
def test_buckets_hold_every_instance_once(case):
    measured = characteristics(case[0], DURATIONS)
    for protocol in ("all", "thumos14-212", "activitynet13"):
        groups, members = group_instances(measured, protocol)
        assert members[0].all() and members.sum(1).tolist() == groups["instances"].tolist()
        for name in measured:
            rows = (groups.index.get_level_values(0) == name).nonzero()[0]
            assert (members[rows].sum(0) == 1).all()
            assert groups.iloc[rows].index.get_level_values(1).tolist() == ["XS", "S", "M", "L", "XL"][: len(rows)]
            if protocol == "all" and name != "context":
                assert (groups["instances"].iloc[rows] > 0).all()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
@steady
def test_quintiles_leave_at_least_a_fifth_of_the_instances_up_to_each_limit(values):
    x = np.array(values, float)
    limits = bucket_limits(x, "length")
    assert list(limits) == sorted(set(limits)) and len(limits) <= 4 and set(limits) <= set(x) - {x.max()}
    for share in (0.2, 0.4, 0.6, 0.8):  # the smallest value that holds the share, unless it is the largest of all
        least = next(v for v in sorted(x) if (x <= v).sum() >= share * len(x) - 1e-9)
        assert least in limits or least == x.max()


@pytest.mark.parametrize("protocol, instances, expected", [
    ("thumos14-211", [1, 2, 40, 41, 80, 81], {"XS": 1, "S": 2, "M": 2, "L": 1}),
    ("activitynet13", [1, 2, 4, 5, 8, 9], {"XS": 1, "S": 2, "M": 2, "L": 1}),
])
def test_upper_limits_belong_to_their_bucket(protocol, instances, expected):
    groups, _ = group_instances(pd.DataFrame({"instances": instances}), protocol)
    assert groups.loc["instances", "instances"].to_dict() == expected


def test_the_surroundings_do_not_depend_on_where_time_begins():
    times = pd.DataFrame([("u", -10, -5, "A"), ("u", -4, -2, "A"), ("u", 3, 6, "A"), ("v", -3, 0, "A")], columns=TRUTH)
    later = times.assign(start=times["start"] + 100, end=times["end"] + 100)
    for each in (times, later):
        assert characteristics(each)["context"].tolist() == [0.8, 0.75, 1, 1]


def test_lengths_are_not_moved_to_the_next_bucket_by_rounding():
    truth = pd.DataFrame([("u", 5.3, 8.3, "A"), ("u", 20.0, 23.001, "A")], columns=TRUTH)
    assert 8.3 - 5.3 > 3
    groups, _ = group_instances(characteristics(truth), "thumos14-212")
    assert groups.loc["length", "instances"].tolist() == [1, 1, 0, 0, 0]
    assert groups.loc["length", "range"].tolist() == ["≤ 3", "3–6", "6–12", "12–18", "> 18"]


def test_the_order_of_the_tables_and_the_unit_of_time_do_not_matter():
    truth, found = crowd()
    base = diagnose(truth, found, durations=dict.fromkeys(truth["video"], 120.0))
    shuffled = [frame.sample(frac=1, random_state=i) for i, frame in enumerate((truth, found))]
    assert tables_equal(diagnose(*shuffled, durations=dict.fromkeys(truth["video"], 120.0)), base)
    doubled = [f.assign(start=2 * f["start"], end=2 * f["end"]) for f in (truth, found)]
    twice = diagnose(*doubled, durations=dict.fromkeys(truth["video"], 240.0))
    for name in ("sensitivity", "false_negatives"):
        assert twice.tables[name].iloc[:, 1:].equals(base.tables[name].iloc[:, 1:])
    assert twice.false_positives.equals(base.false_positives) and twice.impact.equals(base.impact)


@given(st.lists(st.sampled_from(["hit", "error", "neither"]), max_size=30), st.integers(1, 40), st.integers(1, 40))
@steady
def test_normalised_ap(outcomes, normal, spare):
    hits, errors = (np.array([o == what for o in outcomes], bool) for what in ("hit", "error"))
    positives, counted = int(hits.sum()) + spare, hits | errors
    plain = normalised_ap(hits, errors, positives, positives)
    assert math.isclose(plain, average_precision(hits[counted], positives), abs_tol=1e-12)
    assert math.isclose(normalised_ap(hits[counted], errors[counted], positives, positives), plain, abs_tol=1e-12)
    values = [normalised_ap(hits, errors, positives, n) for n in (normal, normal + 1)]
    assert 0 <= values[0] <= values[1] + 1e-12 <= hits.sum() / positives + 2e-12  # no more than the recall


def test_buckets_of_equal_quality_and_different_size_get_equal_values():
    "A rare and a common class, each found after one error: mAP_N says they are alike, AP does not."
    rare = pd.DataFrame([("u", 0.0, 4.0, "A")], columns=TRUTH)
    many = pd.DataFrame([("v", 10.0 * i, 10 * i + 4.0, "B") for i in range(4)], columns=TRUTH)
    truth = pd.concat([rare, many])
    wrong = pd.DataFrame({"video": "x", "start": 0.0, "end": 1.0, "label": ["A", "B"], "score": 2.0})
    found = pd.concat([truth.assign(score=1.0), wrong])
    values = diagnose(truth, found).sensitivity["mAP_N"].loc["instances"]
    assert values.index.tolist() == ["XS", "S"] and np.isclose(values["XS"], values["S"])
    assert evaluate(truth, found).per_class[0.5].tolist() == [0.5, 0.8]


truth = pd.DataFrame([("u", 0.0, 4.0, "A"), ("v", 2.0, 6.0, "B")], columns=TRUTH)
found = pd.DataFrame([("u", 0.0, 4.0, "A", 0.9), ("v", 2.0, 6.0, "B", 0.8)], columns=FOUND)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", [None, "thumos14-212", "activitynet13"])
def test_empty_tables_have_explicit_values(protocol):
    for g, d in [(truth, found.iloc[:0]), (truth.iloc[:0], found), (truth.iloc[:0], found.iloc[:0])]:
        result = diagnose(g, d, protocol=protocol, durations={"u": 10, "v": 10})
        assert not any(frame.isna().any(axis=None) for frame in result.tables.values())
        assert result.false_positives.eq(0).all(axis=None) and len(result.false_positives) == 10
        assert result.impact["average"].tolist() == [0] * 6 + [len(g) > 0]
        assert result.sensitivity["mAP_N"].eq(0).all()
        assert result.false_negatives["missed"].tolist() == [int(n > 0) for n in result.false_negatives["instances"]]
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
        assert "nan" not in result.markdown().lower() and "; average mAP 0.0" in str(result)
        assert str(result).startswith("nothing ") and result.markdown().startswith("**Nothing ")
    plt.close(plot_diagnosis(result))


def test_a_perfect_detector_has_nothing_to_gain():
    result = diagnose(truth, found, durations={"u": 4, "v": 8})
    assert result.mAP.eq(1).all() and result.impact.eq(0).all(axis=None)
    assert "; nothing to gain from any kind of error; 0.0% of the instances missed" in str(result)
    assert result.false_negatives["missed"].eq(0).all()
    assert result.false_positives["true positive"].eq(1).all() and result.false_positives["detections"].eq(2).all()
    assert result.sensitivity["mAP_N"].eq(result.sensitivity["instances"] > 0).all()


def test_classes_without_ground_truth_are_left_out_and_counted():
    stray = pd.concat([found, found.assign(label="C", score=5.0), found.assign(video="x", score=0.1)])
    result = diagnose(truth, stray)
    assert result.false_positives.loc[10, "detections"] == 4 and result.false_positives.loc[10, "background"] == 0.5
    assert list(result.notes.values()) == [2, 2, 2] and "coverage left out" in [*result.notes][-1]
    assert all(f"- {note}: 2" in result.markdown() for note in result.notes)


def test_durations_come_from_the_file_or_from_the_caller(tmp_path):
    g, d = crowd(videos=5)
    seconds = dict.fromkeys(g["video"], 130.0)
    expected = diagnose(g, d, durations=seconds)
    assert "coverage" in expected.sensitivity.index.get_level_values(0)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(as_json(g, "database", duration=130.0)))
    for source in (path, str(path), json.loads(path.read_text())):
        assert tables_equal(diagnose(source, as_json(d, "results")), expected)
    assert tables_equal(diagnose(g, d, durations=pd.Series(seconds)), expected)
    for without in (diagnose(g, d), diagnose(as_json(g, "database"), d), diagnose(path, d, durations={})):
        assert "coverage" not in without.sensitivity.index.get_level_values(0)
        assert without.notes["annotated videos without a duration, coverage left out"] == g["video"].nunique()


def test_without_the_duration_of_one_video_coverage_is_left_out():
    g, d = crowd(videos=5)
    content = as_json(g, "database", duration=130.0)
    del content["database"]["0"]["duration"]
    result = diagnose(content, as_json(d, "results"))
    assert "coverage" not in result.sensitivity.index.get_level_values(0)
    assert result.notes["annotated videos without a duration, coverage left out"] == 1


def test_names_of_durations_may_be_in_another_unicode_form():
    composed, decomposed = "\u00fcbung", "u\u0308bung"
    g, d = (frame.assign(video=composed) for frame in (truth, found))
    expected = diagnose(g, d, durations={composed: 40.0})
    assert tables_equal(diagnose(g, d.assign(video=decomposed), durations={decomposed: 40.0}), expected)


def test_lengths_of_time_differences_are_seconds():
    g, d = crowd(videos=3)
    g, d = (f.assign(start=f["start"].round(3), end=f["end"].round(3)) for f in (g, d))
    as_times = [f.assign(**{c: pd.to_timedelta(f[c], unit="s") for c in ("start", "end")}) for f in (g, d)]
    like_thumos = Protocol("thumos14")  # limits of the buckets in seconds
    assert tables_equal(diagnose(*as_times, protocol=like_thumos), diagnose(g, d, protocol=like_thumos))


def test_options_are_checked_before_anything_is_read():
    for options in (dict(protocol="thumos14-challenge"), dict(profile_tiou=0), dict(tiou=2), dict(protocol="thumos")):
        with pytest.raises(DataError) as error:
            diagnose("lost.json", "lost.json", **options)
        assert "lost.json" not in str(error.value)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0, -1.0, None, "long"])
def test_impossible_durations_name_the_video(seconds):
    with pytest.raises(DataError, match=r"video 'v'.*durations=\{\}"):
        diagnose(truth, found, durations={"u": 9.0, "v": seconds})
    with pytest.raises(DataError, match="video 'v'"):
        diagnose(truth, found, durations={"u": 9.0})


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="above 0 and at most 1"):
        diagnose(truth, found, profile_tiou=0)
    with pytest.raises(DataError, match="thumos14-212"):
        diagnose(truth, found, protocol="thumos")
    with pytest.raises(DataError, match="one tIoU"):
        diagnose(truth, found, profile_tiou=(0.3, 0.5))
    with pytest.raises(DataError, match="'thumos14-challenge' has the rule"):
        diagnose(truth, found, protocol="thumos14-challenge")


def test_json_markdown_and_picture_hold_what_the_tables_hold():
    g, d = crowd()
    result = diagnose(g, d, protocol=Protocol("thumos14-like"), durations=dict.fromkeys(g["video"], 130.0))
    kept = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert kept == result.to_dict() and kept["mAP"] == {str(t): v for t, v in result.mAP.items()}
    for name, frame in result.tables.items():
        again = pd.DataFrame(kept[name]).set_index(list(frame.index.names))
        pd.testing.assert_frame_equal(again, frame.rename(columns=str), check_names=False, check_index_type=False)
    lines = result.markdown().splitlines()
    shifted = int(result.shifts["consistent"].sum())
    tables = 4 + (shifted > 0)
    assert sum(line.startswith("| ---") for line in lines) == tables
    assert sum(line.startswith("|") for line in lines) == 2 * tables + sum(map(len, result.tables.values())) + shifted
    figure = plot_diagnosis(result)
    bars = figure.axes[0].containers
    assert len(figure.axes) == 6 and [b.get_label() for b in bars] == list(ERROR_KINDS)
    share = 100 * result.false_positives["background"].to_numpy()
    assert np.allclose([patch.get_height() for patch in bars[-1]], share)
    assert all(ax.get_xlabel() or ax.get_title() for ax in figure.axes)
    plt.close(figure)


def test_the_ranges_below_a_panel_do_not_overlap():
    truth, found = crowd(videos=5)
    figure = plot_diagnosis(diagnose(truth, found, durations={v: 3217.3 for v in truth["video"]}))
    figure.canvas.draw()
    for ax in figure.axes[2:]:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert boxes and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:])), ax.get_title()
    plt.close(figure)


def test_one_reading_answers_all_questions(tmp_path, monkeypatch):
    paths = tmp_path / "annotations.json", tmp_path / "detections.json"
    for path, frame, section in zip(paths, crowd(videos=5), ("database", "results")):
        path.write_text(json.dumps(as_json(frame, section, duration=130.0)))
    apart = evaluate(*paths), average_recall(*paths), recall_at(*paths), diagnose(*paths)
    read, read_text = [], files.read_text
    monkeypatch.setattr(files, "read_text", lambda path: read.append(path) or read_text(path))
    case = read_case(*paths)
    together = evaluate(case), average_recall(case), recall_at(case), diagnose(case)
    assert read == [*paths]
    assert together[0].to_dict() == apart[0].to_dict() and together[3].to_dict() == apart[3].to_dict()
    assert together[1].equals(apart[1]) and together[2].equals(apart[2])
    with pytest.raises(DataError, match="'thumos14-challenge' has the rule"):
        diagnose(read_case(*crowd(videos=1), "thumos14-challenge"))


# ---- videos whose times are shifted


@pytest.mark.parametrize("seed", range(3))
def test_shifts_equal_their_definition(seed):
    truth, found = crowd(seed, videos=4)
    shifts, late = time_shifts(truth, found), {}
    for g in truth.itertuples():
        near = [d for _, d in by_score(found) if (d.video, d.label) == (g.video, g.label) and overlap(d, g) >= 0.1]
        if near:
            late.setdefault(g.video, []).append((near[0].start + near[0].end - g.start - g.end) / 2)
    assert sorted(late) == list(shifts.index)
    for video, values in late.items():
        want = [len(values), *np.quantile(values, [0.5, 0.25, 0.75])]
        assert np.allclose(shifts.loc[video, ["instances", "shift", "low", "high"]].astype(float), want)
        signs = [value > 0 for value in values if value != 0]
        p = 1.0 if not signs else binomtest(sum(signs), len(signs)).pvalue
        assert shifts.loc[video, "consistent"] == (p * len(late) <= 0.01) or math.isclose(p * len(late), 0.01)


def test_shifts_of_clocks_are_found_and_scattered_errors_are_none():
    random = np.random.default_rng(0)
    start = np.concatenate([20.0 * np.arange(40)] * 3)
    truth = pd.DataFrame({"video": np.repeat(["u", "v", "w"], 40), "start": start, "end": start + 5, "label": "A"})
    clock = truth["video"].map({"u": -1.5, "v": 0.0, "w": 0.8}).to_numpy()
    moves = {end: clock + random.normal(0, 0.5, 120) for end in ("start", "end")}
    found = truth.assign(score=random.uniform(size=120), **{end: truth[end] + move for end, move in moves.items()})
    result = diagnose(truth, found)
    assert result.shifts["consistent"].tolist() == [True, False, True]
    assert np.allclose(result.shifts["shift"], [-1.5, 0, 0.8], atol=0.3)
    better = evaluate(truth, shift_back(found, result.shifts)).average - evaluate(truth, found).average
    assert result.shift_gain == pytest.approx(better) and better > 0.05
    text = result.markdown()
    assert "2 of 3 videos are detected early (-) or late throughout" in text
    assert text.index("| u ") < text.index("| w ") and "| v " not in text
    alone = diagnose(truth, found[found["video"] == "v"])
    assert alone.shift_gain == 0 and "throughout" not in alone.markdown()
    kept = alone.to_dict()
    assert [each["video"] for each in kept["shifts"]] == ["v"] and kept["shifts"][0]["consistent"] is False
