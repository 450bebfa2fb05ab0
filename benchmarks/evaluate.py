"""How long judging takes: mean average precision and soft-NMS against references written from their definitions.

python benchmarks/evaluate.py [--plot benchmarks/evaluate.png] [--skip-slow]
"""

import argparse
import time
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from selfdetr.evaluation import PROTOCOLS, average_precision, evaluate
from selfdetr.segments import soft_nms

THUMOS = dict(videos=212, classes=20, each=200, instances=3358, seconds=217.0)
ACTIVITYNET = dict(videos=4728, classes=200, each=100, instances=7654, seconds=118.0)
AIMS = {"THUMOS14": 0.15, "ActivityNet": 2.0, "soft-NMS": 0.5}  # seconds
LEVELS = {"THUMOS14": (0.3, 0.4, 0.5, 0.6, 0.7), "ActivityNet": PROTOCOLS["activitynet13"].tiou}


def make_results(videos, classes, each, instances, seconds, seed=0):
    "Instances, and detections of which half are instances moved a little; scores say little about quality."
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, seconds, instances)
    truth = pd.DataFrame(
        {
            "video": rng.integers(0, videos, instances),
            "start": start,
            "end": start + rng.lognormal(1.2, 0.7, instances),
            "label": rng.integers(0, classes, instances),
        }
    )
    n = videos * each
    near = truth.iloc[rng.integers(0, instances, n)].reset_index(drop=True)
    length = (near.end - near.start).to_numpy()
    moved = near.assign(
        start=near.start + rng.normal(0, 0.15, n) * length, end=near.end + rng.normal(0, 0.15, n) * length
    )
    start = rng.uniform(0, seconds, n)
    anywhere = pd.DataFrame(
        {
            "video": rng.integers(0, videos, n),
            "start": start,
            "end": start + rng.lognormal(1.2, 0.7, n),
            "label": rng.integers(0, classes, n),
        }
    )
    found = pd.DataFrame(np.where(rng.random((n, 1)) < 0.5, moved, anywhere), columns=moved.columns).astype(float)
    found["end"] = np.maximum(found.start, found.end)
    found["score"] = rng.uniform(size=n) ** 3
    names = {c: [f"{c}_{i:05d}" for i in range(k)] for c, k in (("video", videos), ("label", classes))}
    for frame in (truth, found):
        for column, name in names.items():
            frame[column] = np.array(name, dtype=object)[frame[column].astype(int)]
    return truth, found


def overlap(start, end, starts, ends):
    "IoU of one segment with many."
    shared = np.clip(np.minimum(end, ends) - np.maximum(start, starts), 0, None)
    return shared / ((end - start) + (ends - starts) - shared)


def by_row(truth, found, tiou):
    "The definition, detection by detection, with the tables as they are: AP, classes x tIoU."
    ap = []
    for label in sorted(truth.label.unique()):
        mine = truth[truth.label == label].reset_index(drop=True)
        videos = mine.groupby("video")
        ranked = found[found.label == label].sort_values("score", ascending=False, kind="stable")
        hits, taken = np.zeros((len(tiou), len(ranked)), bool), np.zeros((len(tiou), len(mine)), bool)
        for i, (_, row) in enumerate(ranked.iterrows()):
            if row["video"] not in videos.groups:
                continue
            instances = videos.get_group(row["video"])
            iou = overlap(row["start"], row["end"], instances["start"].to_numpy(), instances["end"].to_numpy())
            for t, threshold in enumerate(tiou):
                for j in np.argsort(-iou, kind="stable"):
                    if iou[j] < threshold:
                        break
                    if not taken[t, instances.index[j]]:
                        taken[t, instances.index[j]] = hits[t, i] = True
                        break
        ap.append(average_precision(hits, len(mine)))
    return np.array(ap)


def by_array(truth, found, tiou):
    "The same loop on arrays, a video at a time only where it has instances of the class."
    ap = []
    for label in sorted(truth.label.unique()):
        mine = truth[truth.label == label]
        ranked = found[found.label == label].sort_values("score", ascending=False, kind="stable")
        hits = np.zeros((len(tiou), len(ranked)), bool)
        rows = dict(tuple(ranked.reset_index(drop=True).groupby("video")))
        for video, instances in mine.groupby("video"):
            if video not in rows:
                continue
            place, there = rows[video].index.to_numpy(), instances[["start", "end"]].to_numpy()
            free = np.ones((len(tiou), len(there)), bool)
            for i, (start, end) in zip(place, rows[video][["start", "end"]].to_numpy()):
                iou = overlap(start, end, there[:, 0], there[:, 1])
                if iou.max() < tiou[0]:
                    continue
                for t, threshold in enumerate(tiou):
                    able = np.where(free[t], iou, -1)
                    j = able.argmax()
                    if able[j] >= threshold:
                        free[t, j], hits[t, i] = False, True
        ap.append(average_precision(hits, len(mine)))
    return np.array(ap)


def soft_by_definition(segments, scores, groups, sigma=0.5, min_score=0.001):
    "Soft-NMS group by group, one kept segment after another: numbers and scores, best first."
    kept, values = [], []
    for rows in np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1):
        score, (start, end) = scores[rows].copy(), segments[rows].T
        while len(rows) and score.max() >= min_score:
            i = score.argmax()
            kept.append(rows[i])
            values.append(score[i])
            score *= np.exp(-(overlap(start[i], end[i], start, end) ** 2) / sigma)
            score[i] = -1.0
    order = np.lexsort((kept, -np.array(values)))
    return np.array(kept)[order], np.array(values)[order]


def timed(function, *args, repeat=1):
    "The result and the shortest time."
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - started)
    return result, min(times)


def report(what, seconds, aim, *rest):
    verdict = f"  aim {aim:g} s: {'met' if seconds <= aim else 'MISSED'}" if aim else ""
    print(f"{what:<58}{seconds:9.3f} s{verdict}", *rest, flush=True)


def judge_thumos(slow):
    print(f"mAP, THUMOS14's size: {THUMOS['videos'] * THUMOS['each']:,} detections, {THUMOS['instances']:,} instances")
    truth, found = make_results(**THUMOS)
    tiou = LEVELS["THUMOS14"]
    ours, seconds = timed(evaluate, truth, found, tiou, repeat=5)
    report("selfdetr.evaluation.evaluate", seconds, AIMS["THUMOS14"])
    references = {"loop over arrays": by_array} | ({"loop over rows of tables": by_row} if slow else {})
    for name, reference in references.items():
        ap, reference_seconds = timed(reference, truth, found, tiou)
        difference = np.abs(ap - ours.per_class.to_numpy()).max()
        ratio = f"  {reference_seconds / seconds:.0f} times ours"
        report(name, reference_seconds, None, f"{ratio}, AP differs by {difference:.0e}")


def judge_activitynet():
    n = ACTIVITYNET["videos"] * ACTIVITYNET["each"]
    print(f"\nmAP, ActivityNet's size: {n:,} detections, {ACTIVITYNET['instances']:,} instances, 10 tIoUs")
    truth, found = make_results(**ACTIVITYNET)
    tracemalloc.start()
    evaluate(truth, found, LEVELS["ActivityNet"])
    peak = tracemalloc.get_traced_memory()[1] / 2**30
    tracemalloc.stop()
    seconds = timed(evaluate, truth, found, LEVELS["ActivityNet"], repeat=3)[1]
    aim = f"aim 1 GiB: {'met' if peak <= 1 else 'MISSED'}"
    report("selfdetr.evaluation.evaluate", seconds, AIMS["ActivityNet"], f"  {peak:.2f} GiB at most, {aim}")


def judge_growth(path):
    "Cost against the number of detections, in ever more videos and in ever fuller ones."
    sizes = np.round(10 ** np.arange(4, 6.01, 0.5)).astype(int)
    kinds = {
        "more videos": lambda n: dict(videos=n // 200, classes=20, each=200, instances=n // 12, seconds=217.0),
        "fuller videos": lambda n: dict(
            videos=50, classes=20, each=n // 50, instances=n // 12, seconds=217.0 * n / 1e4
        ),
    }
    print("\nGrowth: seconds for " + ", ".join(f"{n:,}" for n in sizes) + " detections")
    figure, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for (kind, make), colour in zip(kinds.items(), ("#0072B2", "#D55E00")):
        times = [timed(evaluate, *make_results(**make(n)), repeat=3)[1] for n in sizes]
        per = np.array(times) / (sizes * np.log(sizes))
        print(f"{kind:<20}" + "".join(f"{t:9.3f}" for t in times), end="   ")
        print(f"time / (n log n) changes by a factor of {per[-1] / per[0]:.2f}")
        ax.loglog(sizes, times, marker="o", color=colour, label=kind)
    line = sizes * np.log(sizes)
    ax.loglog(sizes, line * times[0] / line[0], "--", color="0.6", label="n log n")
    ax.set(xlabel="detections", ylabel="seconds", title="evaluate, five tIoUs")
    ax.legend(frameon=False)
    if path:
        figure.savefig(path, dpi=100)


def judge_soft_nms(slow):
    videos, classes, each, here = 211, 20, 200, 8
    groups, rng = np.repeat(np.arange(videos * classes), each), np.random.default_rng(0)
    n = len(groups)
    shape = (videos * classes, here)
    centre, length = rng.uniform(0, 217, shape), rng.lognormal(1.2, 0.7, shape)
    which, near = (groups, rng.integers(0, here, n)), rng.random(n) < 0.5
    moved = centre[which] + rng.normal(0, 0.2, n) * length[which]
    start = np.where(near, moved, rng.uniform(0, 217, n))
    long = np.where(near, length[which] * np.exp(rng.normal(0, 0.2, n)), rng.lognormal(1.2, 0.7, n))
    segments, scores = np.stack([start, start + long], -1), rng.uniform(size=n) ** 3
    print(f"\nSoft-NMS of {videos} videos x {classes} classes x {each} detections, half of them near {here} instances")
    (kept, value), seconds = timed(soft_nms, segments, scores, groups, repeat=3)
    report("selfdetr.segments.soft_nms", seconds, AIMS["soft-NMS"])
    if slow:
        (kept_slow, value_slow), slow_seconds = timed(soft_by_definition, segments, scores, groups)
        same = np.array_equal(kept, kept_slow) and np.array_equal(value, value_slow)
        ratio = f"  {slow_seconds / seconds:.0f} times ours"
        bits = "the same bits" if same else "NOT the same bits"
        report("group by group, by its definition", slow_seconds, None, f"{ratio}, {bits}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="write the picture of the growth there")
    parser.add_argument("--skip-slow", action="store_true", help="without the references that take half a minute")
    options = parser.parse_args()
    judge_thumos(not options.skip_slow)
    judge_activitynet()
    judge_growth(options.plot)
    judge_soft_nms(not options.skip_slow)
