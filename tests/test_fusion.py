"Fusion of scores against its definition, and what is refused."

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdetr.data.files import DataError
from selfdetr.fusion import fuse_scores, read_video_scores
from selfdetr.inference import DETECTION_COLUMNS

row = st.tuples(st.sampled_from("uv"), st.integers(0, 9), st.integers(0, 5), st.sampled_from("AB"), st.integers(0, 9))


@st.composite
def some_detections(draw, most=25):
    rows = draw(st.lists(row, min_size=1, max_size=most))
    return pd.DataFrame([(v, float(s), float(s + w), c, p / 10) for v, s, w, c, p in rows], columns=DETECTION_COLUMNS)


def test_nothing_to_fuse_stays_nothing():
    nothing = pd.DataFrame(columns=DETECTION_COLUMNS).astype({"start": float, "end": float, "score": float})
    assert fuse_scores(nothing, pd.DataFrame(columns=["video", "label", "score"])).empty


def test_both_layouts_of_video_scores_agree(tmp_path):
    by_list = {"class": ["A", "B"], "results": {"u": [0.25, 0.75], "v": [1.0, 0.0]}}
    items = {v: [{"label": c, "score": s} for c, s in zip("AB", p)] for v, p in by_list["results"].items()}
    by_item = {"results": items}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(by_item))
    frames = [read_video_scores(x) for x in (by_list, by_item, path)]
    assert all(frame.equals(frames[0]) for frame in frames) and len(frames[0]) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "no 'results' section"),
        ({"results": [1]}, "no 'results' section"),
        ({"class": ["A"], "results": {"u": [0.1, 0.2]}}, "video 'u'.*a list of 1 scores"),
        ({"results": {"u": [{"label": "A"}]}}, "video 'u'.*label and score"),
        ({"results": {"u": 3}}, "video 'u'.*label and score"),
        ({"results": {"u": [{"label": "A", "score": "high"}]}}, "video 'u'"),
        (
            {"results": {"u": [{"label": "A", "score": float("nan")}]}},
            "video 'u': the score of A is nan; write a finite number",
        ),
        ({"results": {"u": [{"label": ["x"], "score": 1.0}]}}, r"video 'u': label is \['x'\]; write one line"),
        ({"results": {"u": [{"label": "x", "score": True}]}}, "video 'u': the score of x is True"),
        ({"class": ["x"], "results": {"u": [True]}}, "video 'u': the score of x is True"),
    ],
)
def test_other_layouts_are_refused_by_name(content, message):
    with pytest.raises(DataError, match=message):
        read_video_scores(content)


@settings(max_examples=20)
@given(found=some_detections(), top=st.integers(1, 3))
def test_fused_scores_are_products_with_the_best_classes(found, top):
    scores = {"u": {"A": 0.2, "B": 0.5, "C": 0.3}, "v": {"A": 0.6, "B": 0.1, "C": 0.3}}
    rows = [(v, c, s) for v, by_class in scores.items() for c, s in by_class.items()]
    fused = fuse_scores(found, pd.DataFrame(rows, columns=["video", "label", "score"]), top)
    expected = [
        (d.video, d.start, d.end, c, d.score * scores[d.video][c])
        for d in found.itertuples()
        for c in sorted(scores[d.video], key=lambda c: -scores[d.video][c])[:top]
    ]
    assert sorted(fused.itertuples(index=False, name=None)) == sorted(expected)
    assert fused.score.is_monotonic_decreasing
    with pytest.raises(DataError, match="no class scores for video '[uv]'"):
        fuse_scores(found, pd.DataFrame([("w", "A", 1.0)], columns=["video", "label", "score"]))


def test_video_scores_in_another_unicode_form_belong_to_their_video():
    composed, decomposed = "\u00fc", "u\u0308"
    found = pd.DataFrame([(composed, 0.0, 1.0, "action", 0.5)], columns=DETECTION_COLUMNS)
    scores = pd.DataFrame([(decomposed, "A", 0.5)], columns=["video", "label", "score"])
    fused = fuse_scores(found, scores)
    assert fused.video.tolist() == [composed] and fused.score.tolist() == [0.25] and fused.label.tolist() == ["A"]
