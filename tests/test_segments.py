"Segments against plain loops: what the definitions say, for random, tied, empty and degenerate input."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from selfdetr.segments import _padded_groups, cw_to_se, elementwise_iou, nms, pairwise_iou, se_to_cw, soft_nms

steady = settings(derandomize=True)  # the same cases on every machine, however slow it is

# Whole numbers make ties, touching, nested, equal and zero-length segments frequent.
grid_segment = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda p: (float(p[0]), float(p[0] + p[1])))
real_segment = st.tuples(st.floats(-50, 50, width=32), st.floats(0, 50, width=32)).map(lambda p: (p[0], p[0] + p[1]))
segment_lists = st.lists(st.one_of(grid_segment, real_segment), max_size=12).map(
    lambda x: np.array(x, float).reshape(-1, 2)
)


@st.composite
def detections(draw):
    "Segments, scores with ties, and group labels."
    n = draw(st.integers(0, 25))
    segments = np.array(draw(st.lists(grid_segment, min_size=n, max_size=n)), float).reshape(-1, 2)
    scores = np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)), float) / 20
    labels = np.array(draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n)), np.int64)
    return segments, scores, labels


def iou_of(a, b):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    covered = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / covered if covered > 0 else 0.0


def nms_loop(segments, scores, labels, threshold, max_keep):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        rivals = [j for j in kept if labels[j] == labels[i]]
        if len(rivals) < max_keep and all(iou_of(segments[i], segments[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept


def soft_nms_loop(segments, scores, labels, weight, min_score, max_keep):
    kept = []
    for label in set(labels.tolist()):
        left = {i: scores[i] for i in np.flatnonzero(labels == label).tolist()}
        for _ in range(max_keep):
            if not left:
                break
            best = min(left, key=lambda i: (-left[i], i))
            value = left.pop(best)
            if value < min_score:
                break
            kept.append((best, value))
            left = {i: s * weight(iou_of(segments[i], segments[best])) for i, s in left.items()}
    return sorted(kept, key=lambda pair: (-pair[1], pair[0]))


shapes = st.tuples(st.integers(0, 3), st.integers(0, 4), st.just(2))


@given(hnp.arrays(np.float64, shapes, elements=st.floats(-1e3, 1e3)))
@steady
def test_conversions_are_inverse(x):
    assert np.allclose(cw_to_se(se_to_cw(x)), x, atol=1e-9)
    assert np.allclose(se_to_cw(cw_to_se(x)), x, atol=1e-9)
    assert np.array_equal(cw_to_se(torch.tensor(x)).numpy(), cw_to_se(x))


def test_conversions_keep_type_and_gradient():
    x = torch.rand(4, 2, 40, 2, dtype=torch.float32, requires_grad=True)
    assert cw_to_se(x).dtype == torch.float32 and cw_to_se(x).requires_grad
    assert cw_to_se(np.zeros((3, 2), np.float32)).dtype == np.float32


@given(segment_lists, segment_lists)
@steady
def test_iou_equals_its_definition(a, b):
    expected = np.array([[iou_of(p, q) for q in b] for p in a]).reshape(len(a), len(b))
    found = pairwise_iou(a, b)
    assert np.allclose(found, expected, atol=1e-9)
    assert np.array_equal(found, pairwise_iou(b, a).T)
    assert np.array_equal(found, pairwise_iou(torch.tensor(a), torch.tensor(b)).numpy())


def test_iou_over_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 2, 5, 2, generator=generator).sort(-1).values
    b = torch.rand(3, 2, 7, 2, generator=generator).sort(-1).values
    together = pairwise_iou(a, b)
    assert together.shape == (3, 2, 5, 7)
    for i in range(3):
        for j in range(2):
            assert torch.equal(together[i, j], pairwise_iou(a[i, j], b[i, j]))
            assert torch.equal(torch.diagonal(together[i, j]), elementwise_iou(a[i, j], b[i, j, :5]))


@given(st.lists(st.tuples(grid_segment, grid_segment), min_size=1, max_size=8), st.sampled_from(["float32", "float64"]))
@steady
def test_iou_gradient_is_finite_for_degenerate_pairs(pairs, dtype):
    a, b = (torch.tensor(x, dtype=getattr(torch, dtype)).requires_grad_() for x in zip(*pairs))
    value = elementwise_iou(a, b)
    gradients = torch.autograd.grad(value.sum(), [a, b])
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)


def test_iou_gradient_equals_finite_differences():
    a = torch.tensor([[0.1, 0.6], [0.2, 0.9], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.3, 0.8], [0.4, 0.7], [0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(elementwise_iou, (a, b))


@given(detections(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([1, 3, 100]))
@steady
def test_nms_equals_the_loop(case, threshold, max_keep):
    expected = nms_loop(*case, threshold, max_keep)
    assert nms(*case, iou_threshold=threshold, max_keep=max_keep).tolist() == expected


@pytest.mark.parametrize("method", ["gaussian", "linear"])
@given(detections(), st.sampled_from([0.0, 0.001, 0.3]), st.sampled_from([1, 3, 200]))
@steady
def test_soft_nms_equals_the_loop(method, case, min_score, max_keep):
    def weight(iou):
        return np.exp(-(iou**2) / 0.5) if method == "gaussian" else (1 - iou if iou > 0.4 else 1.0)

    kept, scores = soft_nms(*case, method=method, min_score=min_score, max_keep=max_keep)
    expected = soft_nms_loop(*case, weight, min_score, max_keep)
    assert np.allclose(scores, [s for _, s in expected], rtol=1e-12, atol=0)
    assert kept.tolist() == [i for i, _ in expected]


def crowd(n=3000, groups=150, seed=0):
    "Many groups of very unequal size, as the classes and videos of a test set are."
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 60, n)
    label = np.minimum(rng.geometric(0.03, n), groups) * 7 - 3
    return np.stack([start, start + rng.lognormal(1, 0.7, n)], -1), rng.uniform(size=n) ** 3, label


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_all_groups_together_equal_one_at_a_time_exactly(method):
    segments, scores, labels = crowd()
    kept, lowered = soft_nms(segments, scores, labels, method=method, max_keep=20)
    hard = nms(segments, scores, labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        alone, alone_scores = soft_nms(segments[members], scores[members], method=method, max_keep=20)
        here = labels[kept] == label
        assert members[alone].tolist() == kept[here].tolist()
        assert alone_scores.tolist() == lowered[here].tolist()
        assert members[nms(segments[members], scores[members])].tolist() == hard[labels[hard] == label].tolist()
    assert (np.diff(lowered) <= 0).all() and (np.diff(scores[hard]) <= 0).all()


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 40))
@steady
def test_groups_are_laid_out_completely(labels, limit):
    labels = np.array(labels, np.int64)
    seen = []
    for rows, real in _padded_groups(labels, limit):
        assert rows.size <= max(limit, rows.shape[1])  # over the limit only when a single group is
        for row, there in zip(rows, real):
            assert len(set(labels[row[there]].tolist())) == 1 and (np.diff(row[there]) > 0).all()
            seen += row[there].tolist()
    assert sorted(seen) == list(range(len(labels)))


def test_order_of_the_input_does_not_matter_without_ties():
    segments, scores, labels = crowd(400, 20)
    shuffle = np.random.default_rng(1).permutation(400)
    hard = nms(segments[shuffle], scores[shuffle], labels[shuffle])
    assert shuffle[hard].tolist() == nms(segments, scores, labels).tolist()
    again, lowered = soft_nms(segments[shuffle], scores[shuffle], labels[shuffle])
    kept, expected = soft_nms(segments, scores, labels)
    assert shuffle[again].tolist() == kept.tolist() and lowered.tolist() == expected.tolist()


def test_tensors_come_back_as_tensors_with_the_same_answer():
    segments, scores, labels = (x.astype(t) for x, t in zip(crowd(300, 20), (np.float32, np.float32, np.int64)))
    tensors = torch.tensor(segments).requires_grad_(), torch.tensor(scores), torch.tensor(labels)
    kept, lowered = soft_nms(*tensors)
    expected, expected_scores = soft_nms(segments, scores, labels)
    assert kept.dtype == torch.int64 and lowered.dtype == torch.float32
    assert kept.tolist() == expected.tolist()
    assert lowered.tolist() == expected_scores.astype(np.float32).tolist()
    assert nms(*tensors).tolist() == nms(segments, scores, labels).tolist()


def test_segments_without_length_suppress_nothing_and_are_not_suppressed():
    segments = np.array([[2.0, 2.0], [2.0, 2.0], [0.0, 4.0]])
    assert nms(segments, np.array([0.9, 0.8, 0.7]), iou_threshold=0).tolist() == [0, 1, 2]
    assert soft_nms(segments, np.array([0.9, 0.8, 0.7]))[1].tolist() == [0.9, 0.8, 0.7]


def test_scores_of_any_sign_in_hard_nms():
    logits = np.array([-3.0, -math.inf, 2.0])
    assert nms(np.array([[0.0, 1], [5, 6], [0, 1]]), logits).tolist() == [2, 1]


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_empty_input(make):
    kept, scores = soft_nms(make((0, 2)), make(0), make(0))
    assert len(kept) == len(scores) == len(nms(make((0, 2)), make(0))) == 0
    assert tuple(pairwise_iou(make((4, 0, 2)), make((4, 3, 2))).shape) == (4, 0, 3)
    assert tuple(cw_to_se(make((0, 2))).shape) == (0, 2)


@pytest.mark.parametrize("suppress", [nms, soft_nms])
def test_impossible_input_is_refused(suppress):
    good = np.array([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="detection 1"):
        suppress(good, np.array([0.5, math.nan]))
    with pytest.raises(ValueError, match="detection 0"):
        suppress(np.array([[math.nan, 1.0], [2.0, 3.0]]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="2 segments, 3 scores"):
        suppress(good, np.ones(3))
    with pytest.raises(ValueError, match="1 labels"):
        suppress(good, np.ones(2), np.zeros(1, int))


@pytest.mark.parametrize("wrong", [{"method": "median"}, {"sigma": 0.0}, {"min_score": -1.0}, {"sigma": math.nan}])
def test_unknown_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="gaussian"):
        soft_nms(np.array([[0.0, 1.0]]), np.ones(1), **wrong)
