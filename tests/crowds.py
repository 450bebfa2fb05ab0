"Detections and their ground truth, made up for the tests of what judges them."

import numpy as np
import pandas as pd
from hypothesis import settings
from hypothesis import strategies as st

steady = settings(derandomize=True, max_examples=15)  # the same cases on every machine
TRUTH, FOUND = ["video", "start", "end", "label"], ["video", "start", "end", "label", "score"]


def overlap(a, b):
    shared = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    covered = (a.end - a.start) + (b.end - b.start) - shared
    return shared / covered if covered > 0 else 0.0


def by_score(found):
    "(position, row), best first; `sorted` is stable, so equal scores keep the order of the table."
    return sorted(enumerate(found.itertuples()), key=lambda item: -item[1].score)


@st.composite
def results(draw, distinct=False, shortest=0):
    "On a grid of whole seconds, where overlaps and scores tie; half of the detections are near some instance."
    place = st.tuples(st.sampled_from("uvw"), st.integers(0, 10), st.integers(shortest, 6), st.sampled_from("AB"))
    n, m = draw(st.sampled_from([4, 8, 1])), draw(st.sampled_from([12, 18, 0, 6]))
    truth = draw(st.lists(place, min_size=n, max_size=n))
    anywhere = st.tuples(st.sampled_from("uvwx"), st.integers(0, 10), st.integers(0, 6), st.sampled_from("ABC"))
    moved = st.tuples(st.sampled_from(truth), st.integers(-1, 1), st.integers(-1, 1), st.sampled_from(["", "", "A"]))
    near = moved.map(lambda m: (m[0][0], m[0][1] + m[1], max(m[0][2] + m[2], 0), m[3] or m[0][3]))
    score = st.integers(0, 1000 if distinct else 8).map(lambda s: s / 10)
    scores = draw(st.lists(score, min_size=m, max_size=m, unique=distinct))
    found = [draw(draw(st.sampled_from([anywhere, near]))) for _ in scores]
    frames = [pd.DataFrame([(v, float(s), float(s + w), c) for v, s, w, c in x], columns=TRUTH) for x in (truth, found)]
    return frames[0], frames[1].astype({"start": float, "end": float}).assign(score=scores)[FOUND]


def crowd(seed=0, videos=20, classes=4, per_video=30):
    "A plausible detector: instances found with jitter, repeats, other classes; times never tie."
    rng = np.random.default_rng(seed)
    n = videos * 6
    start = rng.uniform(0, 100, n)
    truth = pd.DataFrame({"video": rng.integers(0, videos, n), "start": start, "end": start + rng.lognormal(1, 0.6, n)})
    truth["label"] = rng.integers(0, classes, n)
    picked = truth.iloc[rng.integers(0, n, videos * per_video)].reset_index(drop=True)
    jitter = rng.normal(0, 1.2, (len(picked), 2))
    found = picked.assign(start=picked["start"] + jitter[:, 0], end=picked["end"] + jitter[:, 1])
    wrong = rng.random(len(found)) < 0.3
    found.loc[wrong, "label"] = rng.integers(0, classes, wrong.sum())
    found["end"] = np.maximum(found["start"], found["end"])
    found["score"] = rng.random(len(found))
    return [frame.astype({"video": str, "label": str}) for frame in (truth, found)]


def as_json(frame, section, **entries):
    items = {v: [] for v in frame["video"]}
    for row in frame.to_dict("records"):
        items[row.pop("video")].append({"segment": [row.pop("start"), row.pop("end")], **row})
    if section == "database":
        items = {v: {"subset": "test", "annotations": a, **entries} for v, a in items.items()}
    return {section: items}
