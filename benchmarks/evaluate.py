"""How long judging takes: mean average precision and soft-NMS against references written from their definitions."""

import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import options_of, traced_peak, verdict

from selfdetr.evaluation import average_precision, evaluate
from selfdetr.protocols import PROTOCOLS
from selfdetr.segments import soft_nms

THUMOS = dict(videos=212, classes=20, each=200, instances=3358, seconds=217.0)
ACTIVITYNET = dict(videos=4728, classes=200, each=100, instances=7654, seconds=118.0)
AIMS = {"THUMOS14": 0.15, "ActivityNet": 2.0, "soft-NMS": 0.5}  # seconds


def make_results(videos, classes, each, instances, seconds, seed=0):
    "Instances, and detections of which half are instances moved a little; scores say little about quality."
    rng = np.random.default_rng(seed)

    def anywhere(n):
        video, start = rng.integers(0, videos, n), rng.uniform(0, seconds, n)
        end = start + rng.lognormal(1.2, 0.7, n)
        return pd.DataFrame({"video": video, "start": start, "end": end, "label": rng.integers(0, classes, n)})

    truth, n = anywhere(instances), videos * each
    near = truth.iloc[rng.integers(0, instances, n)].reset_index(drop=True)
    moved = near.copy()
    for column in ("start", "end"):
        moved[column] += rng.normal(0, 0.15, n) * (near.end - near.start)
    other = anywhere(n)
    found = pd.DataFrame(np.where(rng.random((n, 1)) < 0.5, moved, other), columns=moved.columns).astype(float)
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


def by_definition(truth, found, tiou):
    "The definition, detection by detection, a video at a time where it has instances of the class: AP, classes x tIoU."
    ap = []
    for label in sorted(truth.label.unique()):
        own = truth[truth.label == label]
        ranked = found[found.label == label].sort_values("score", ascending=False, kind="stable")
        hits = np.zeros((len(tiou), len(ranked)), bool)
        rows = dict(tuple(ranked.reset_index(drop=True).groupby("video")))
        for video, instances in own.groupby("video"):
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
        ap.append(average_precision(hits, len(own)))
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


def timed(what, repeat, function, *args, aim=None):
    "The result and the shortest time, which is printed."
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - started)
    seconds = min(times)
    judged = f"  aim {aim:g} s: {verdict(seconds, aim)}" if aim else ""
    print(f"{what:<40}{seconds:9.3f} s{judged}", flush=True)
    return result, seconds


def judge_map(name, size, tiou):
    print(f"mAP, {name}'s size: {size['videos'] * size['each']:,} detections, {size['instances']:,} instances")
    results = *make_results(**size), tiou
    peak = traced_peak(lambda: evaluate(*results)) * 1e6 / 2**30
    ours, seconds = timed("selfdetr.evaluation.evaluate", 3, evaluate, *results, aim=AIMS[name])
    print(f"memory: {peak:.2f} GiB at most, aim 1 GiB: {verdict(peak, 1)}")
    return results, ours, seconds


def judge_growth(sizes, path):
    "Cost against the number of detections, in ever more videos and in ever fuller ones."
    kinds = {
        "more videos": lambda n: dict(videos=n // 200, each=200, seconds=217.0),
        "fuller videos": lambda n: dict(videos=50, each=n // 50, seconds=217.0 * n / 1e4),
    }
    figure, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    line = sizes * np.log(sizes)
    for (kind, make), colour in zip(kinds.items(), ("#0072B2", "#332288")):
        print(f"\n{kind}, 5 tIoUs")
        times = [timed(f"{n:,} detections", 3, evaluate, *make_results(classes=20, instances=n // 12, **make(n)))[1]
                 for n in sizes]  # fmt: skip
        per = np.array(times) / line
        print(f"time / (n log n) changes by a factor of {per[-1] / per[0]:.2f}")
        ax.loglog(sizes, times, marker="o", color=colour, label=kind)
    ax.loglog(sizes, line * per[0], "--", color="0.6", label="n log n")
    ax.set(xlabel="detections", ylabel="seconds", title="evaluate, five tIoUs")
    ax.legend(frameon=False)
    if path:
        figure.savefig(path, dpi=100)


def judge_soft_nms(videos, classes=20, each=200, here=8):
    groups, rng = np.repeat(np.arange(videos * classes), each), np.random.default_rng(0)
    n, shape = len(groups), (videos * classes, here)
    centre, length = rng.uniform(0, 217, shape), rng.lognormal(1.2, 0.7, shape)
    which, near = (groups, rng.integers(0, here, n)), rng.random(n) < 0.5
    moved = centre[which] + rng.normal(0, 0.2, n) * length[which]
    start = np.where(near, moved, rng.uniform(0, 217, n))
    long = np.where(near, length[which] * np.exp(rng.normal(0, 0.2, n)), rng.lognormal(1.2, 0.7, n))
    segments, scores = np.stack([start, start + long], -1), rng.uniform(size=n) ** 3
    print(f"\nSoft-NMS of {videos} videos x {classes} classes x {each} detections, half of them near {here} instances")
    ours, seconds = timed("selfdetr.segments.soft_nms", 3, soft_nms, segments, scores, groups, aim=AIMS["soft-NMS"])
    theirs, slow = timed("group by group, by its definition", 1, soft_by_definition, segments, scores, groups)
    bits = "the same bits" if all(map(np.array_equal, ours, theirs)) else "NOT the same bits"
    print(f"{slow / seconds:.0f} times ours, {bits}")


def main(argv=None):
    options = options_of(__doc__, argv, plot=None)
    few = dict(videos=6, each=20, instances=60) if options.smoke else {}
    results, ours, seconds = judge_map("THUMOS14", THUMOS | few, PROTOCOLS["thumos14-212"].tiou)
    ap, slow = timed("a loop over arrays", 1, by_definition, *results)
    print(f"{slow / seconds:.0f} times ours, AP differs by {np.abs(ap - ours.per_class.to_numpy()).max():.0e}\n")
    judge_map("ActivityNet", ACTIVITYNET | few, PROTOCOLS["activitynet13"].tiou)
    sizes = np.array([1000, 3000]) if options.smoke else np.round(10 ** np.arange(4, 6.01, 0.5)).astype(int)
    judge_growth(sizes, options.plot)
    judge_soft_nms(videos=2 if options.smoke else 211)


if __name__ == "__main__":
    main()
