"""Diversity (Eq. 10) in both readings: plain loops, brute force over a grid, proven bounds, and the invariances."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import generator, random_maps
from torch.testing import assert_close

from selfdetr.diversity import _column_distances, collapse_report, diversity, relative_diversity
from selfdetr.model import ModelConfig, SelfDETR

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=25)


def norm(r):
    "The composite norm of an array, or of each of a stack of them."
    return np.sqrt(abs(r).sum(-2).max(-1) * abs(r).sum(-1).max(-1))


def least_on_a_grid(a, steps):
    "Eq. 10 by brute force: every vector of a grid between the least and the largest value of each column."
    axes = [np.linspace(low, high, steps) for low, high in zip(a.min(0), a.max(0))]
    vectors = np.array(list(itertools.product(*axes)))
    return norm(a - vectors[:, None, :]).min()


# ---- over the rows


@few
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_diversity_is_the_smallest_norm_over_the_rows(seed, rows, columns):
    maps = random_maps(seed, 2, rows, columns).numpy()
    for found, a in zip(diversity(torch.from_numpy(maps)), maps):
        assert float(found) == pytest.approx(min(norm(a - row) for row in a), abs=2e-5)


@few
@given(SEEDS, st.integers(2, 6), st.floats(0.1, 10), st.sampled_from(["rows", "any"]))
def test_diversity_is_a_distance_to_maps_of_equal_rows(seed, size, scale, over):
    a, g = random_maps(seed, size, size), generator(seed)
    same_row = torch.randn(1, size, generator=g, dtype=torch.float64)
    expected, near = diversity(a, over), {"atol": 1e-4, "rtol": 3e-4}
    assert_close(diversity(scale * a, over), scale * expected, **near)
    assert_close(diversity(a + same_row, over), expected, **near)
    order = torch.randperm(size, generator=g)
    assert_close(diversity(a[order][:, order], over), expected, **near)
    assert diversity(same_row.expand(size, -1), over) < 1e-5


def before(maps):
    "The measure as trained runs have used it as a loss from the first version on, statement by statement."
    maps = maps.float()
    by_column = _column_distances(maps).amax(-1).clamp(min=0)
    by_row = torch.cdist(maps, maps, p=1).amax(-1)
    return (by_column * by_row).sqrt().amin(-1)


@pytest.mark.parametrize("shape", [(2, 2), (3, 4, 64, 64), (2, 20, 64)])
def test_the_default_and_its_gradient_keep_every_bit(shape):
    found, gradients = [], []
    for measure in (before, diversity):
        maps = random_maps(0, *shape).float().requires_grad_(True)
        found.append(measure(maps))
        gradients.append(torch.autograd.grad(found[-1].sum(), maps)[0])
    assert torch.equal(*found) and torch.equal(*gradients)
    assert torch.equal(diversity(maps, "rows"), found[0])


# ---- over all vectors


@pytest.mark.parametrize("size", [2, 3, 20, 64])
def test_the_identity_is_one_from_equal_rows_however_large(size):
    assert_close(diversity(torch.eye(size)), torch.tensor(2.0 * (size - 1)).sqrt())
    assert_close(diversity(torch.eye(size), "any"), torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rows, columns, steps", [(2, 2, 401), (4, 2, 401), (3, 3, 61), (2, 3, 61)])
def test_over_any_is_the_least_of_a_grid_of_vectors(seed, rows, columns, steps):
    a = random_maps(seed, rows, columns)
    found = float(diversity(a, "any"))
    # the nearest grid vector is half a step away in each column; that moves a column sum by up to rows / 2 steps
    spacing = float((a.amax(0) - a.amin(0)).max()) / (steps - 1)
    on_grid = least_on_a_grid(a.numpy(), steps)
    assert (1 - 2e-4) * found <= on_grid <= found + max(rows, columns) * spacing


@few
@given(SEEDS, st.integers(1, 8), st.integers(1, 8))
def test_over_any_lies_between_its_bounds(seed, rows, columns):
    """Both factors have a bound of their own. Two rows have the distance ||a_i - a_k||_1 <= 2 ||R||_inf, by way of the
    vector. A column's sum of distances is least at its median."""
    a = random_maps(seed, rows, columns)
    found, over_rows = diversity(a, "any"), diversity(a)
    across = torch.cdist(a, a, p=1).max() / 2
    down = (a - a.quantile(0.5, 0)).abs().sum(0).max()
    assert (across * down).sqrt() * (1 - 1e-4) - 1e-6 <= found <= over_rows
    assert found <= norm(a.numpy()) * (1 + 1e-4)  # the vector 0 is allowed too
    assert (found == 0) == (rows == 1 or columns == 1)  # the rows of one column are all 1


def test_a_vector_that_is_neither_a_row_nor_a_median_can_be_the_best():
    "By hand, a single column: 0, 0, 1 and the vector x have the norms 1 + x and 1 - x up to x = 1/2, then 1 + x and x."
    a = torch.tensor([[0.0], [0.0], [1.0]])
    assert_close(diversity(a, "any"), torch.tensor(0.75).sqrt())
    assert_close(diversity(a), torch.tensor(1.0))
    # half of all queries at one key, half at another: the mean of the rows, at a distance of 1 from each
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
    assert_close(diversity(half, "any"), torch.tensor(4.0).sqrt())
    assert_close(diversity(half), torch.tensor(8.0).sqrt())


def test_over_any_takes_stacks_dtypes_and_what_is_no_number():
    maps = random_maps(0, 2, 3, 4, 5)
    found = diversity(maps.float().requires_grad_(True), "any")
    assert found.shape == (2, 3) and found.dtype == torch.float32 and not found.requires_grad
    assert_close(found[1, 2], diversity(maps[1, 2].to(torch.bfloat16), "any"), atol=0.02, rtol=0)
    maps[0, 0, 1, 1] = math.nan
    assert diversity(maps, "any").isnan().nonzero().tolist() == diversity(maps).isnan().nonzero().tolist() == [[0, 0]]


def test_an_unknown_form_is_an_error_that_names_the_choices():
    for measure in (diversity, relative_diversity):
        with pytest.raises(ValueError, match="'columns'.*rows.*any"):
            measure(torch.eye(2), "columns")


# ---- the relative form


@few
@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 10), st.sampled_from(["rows", "any"]))
def test_the_relative_form_divides_by_the_norm_of_the_map(seed, rows, columns, scale, over):
    a = random_maps(seed, rows, columns)
    expected = diversity(a, over) / norm(a.numpy())
    assert_close(relative_diversity(a, over), expected.float(), atol=1e-5, rtol=1e-5)
    assert_close(relative_diversity(scale * a, over), expected.float(), atol=1e-4, rtol=3e-4)
    assert over == "rows" or relative_diversity(a, over) <= 1 + 1e-4


class RandomWindows:
    "Windows of random features, of which the last two are partly padding."

    length, valid = 16, np.array([16, 16, 16, 9, 5])
    features = torch.randn(5, 16, 8, generator=generator(0))

    def __len__(self):
        return len(self.valid)

    def batch(self, indices):
        return self.features[indices], torch.arange(16) >= torch.tensor(self.valid[indices])[:, None], None


def test_the_report_has_both_forms_of_every_window():
    torch.manual_seed(0)
    windows = RandomWindows()
    model = SelfDETR(ModelConfig(channels=8, classes=2, dim=16, heads=2, hidden=16, queries=5,
                                 encoder_layers=1, decoder_layers=1, norm_groups=2))  # fmt: skip
    report = collapse_report(model, windows).set_index("part")
    assert list(report) == ["layer", "diversity", "relative"]
    one_by_one = []
    model.eval()
    for i, n in enumerate(windows.valid):
        features, mask, _ = windows.batch([i])
        with torch.no_grad():
            maps = model(features, mask).encoder_maps[0, 0, :n, :n]
        one_by_one.append([float(diversity(maps)), float(relative_diversity(maps))])
    assert report.loc["encoder", ["diversity", "relative"]].tolist() == pytest.approx(np.mean(one_by_one, 0), rel=1e-3)
