"""Claims about layers, margins and one row by hand; many claims, many data sets, and rules that always hold."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from selfdetr.report import Effect, effect_of
from selfdetr.study import Run, RunSpec
from selfdetr.study.statistics import SMALLEST, Claim, holm_levels, judge_claim, p_value, pool_effects, verdict


def test_claims_about_layers_margins_and_one_row():
    "Diversities of two rows and two layers, three seeds, written down by hand."
    def run(average, first, last):
        layers = [{"part": "decoder", "layer": i, "diversity": d} for i, d in ((1, first), (2, last))]
        return Run(Path("unused"), RunSpec(), {"average": average, "diversity": layers}, pd.DataFrame())

    runs = {
        "a": [run(50.0, 3.0, 1.0), run(51.0, 3.2, 1.1), run(52.0, 2.9, 1.0)],
        "b": [run(50.5, 3.0, 2.0), run(51.4, 3.2, 2.2), run(52.6, 2.9, 2.1)],
    }
    falls = {"text": "falls", "better": "a", "worse": "a", "of": "decoder 1", "than": "decoder"}
    assert judge_claim(falls, runs).verdict == "confirmed"  # +2.0, +2.1, +1.9
    raises = {"text": "raises", "better": "b", "worse": "a", "of": "decoder 2"}
    assert "+1.07 [" in judge_claim(raises, runs).evidence and judge_claim(raises, runs).unit == "d(A)"
    same = {"text": "no gain", "better": "b", "worse": "a"}  # +0.5, +0.4, +0.6: clearly higher, by less than 1
    assert judge_claim(same, runs).verdict == "confirmed"
    assert judge_claim(same | {"margin": 1.0}, runs).verdict == "confirmed"
    assert judge_claim(same | {"margin": 0.1}, runs).verdict == "contradicted"
    assert judge_claim(same | {"margin": 0.5}, runs).verdict == "open"


def test_a_claim_on_folds_is_paired_by_fold_and_seed_and_counts_folds():
    "Three folds with two seeds each; the differences are 1 and 3, 2 and 2, 4 and 0."
    def runs(averages):
        pairs = [(fold, seed) for fold in "123" for seed in (0, 1)]
        return [Run(Path("unused"), RunSpec(fold=fold, seed=seed), {"average": average}, pd.DataFrame())
                for (fold, seed), average in zip(pairs, averages)]  # fmt: skip

    by_row = {"a": runs([10, 20, 30, 40, 50, 60]), "b": runs([11, 23, 32, 42, 54, 60])}
    better = {"text": "better", "better": "b", "worse": "a"}  # each fold by 2: no spread
    evidence = "+2.0 [+2.0, +2.0] mAP, 3 folds x 2 seeds"
    assert judge_claim(better, by_row) == Claim("better", "paper", "confirmed", evidence, 2.0, 0.0, 3)
    published = judge_claim({"text": "as printed", "better": "a", "worse": 20.0}, by_row)  # -5, 15, 35: 15 +- 49.7
    assert published.evidence == "+15.0 [-34.7, +64.7] mAP, 3 folds x 2 seeds"
    one = {row: each[:2] for row, each in by_row.items()}  # of one fold: paired by seed, 2 +- 12.7
    assert judge_claim(better, one).evidence == "+2.0 [-10.7, +14.7] mAP, 1 fold x 2 seeds"


def test_the_papers_effect_is_known_where_it_prints_both_rows():
    runs = {name: [Run(Path("unused"), RunSpec(), {"average": value + seed}, pd.DataFrame()) for seed in (0, 1, 2)]
            for name, value in (("a", 10.0), ("b", 12.0))}  # fmt: skip
    claim, paper = {"text": "better", "better": "b", "worse": "a"}, {"a": 50.3, "b": 56.7}
    assert judge_claim(claim, runs, paper).paper == 6.4
    assert judge_claim(claim, runs, paper).verdict == "confirmed, smaller"
    assert judge_claim(claim, runs, {"b": 56.7}).paper is None
    assert judge_claim(claim | {"margin": 1.0}, runs, paper).paper is None  # "no gain" has no effect to be measured by
    assert judge_claim(claim | {"whose": "others"}, runs, whose="ours").whose == "others"


effects = st.tuples(st.floats(-20, 20), st.floats(0, 10), st.floats(0.5, 10) | st.none())


@given(effects)
def test_a_verdict_says_what_the_interval_says(case):
    middle, half, paper = case
    low, high = middle - half, middle + half
    said = verdict({"low": low, "high": high}, paper, SMALLEST)
    assert (said in ("confirmed", "confirmed, smaller")) == (low > 0)
    assert (said == "contradicted") == (high < 0)
    if said == "within 1.5 of nothing":
        assert max(abs(low), abs(high)) <= 1.5
    if said in ("confirmed, smaller", "no effect of that size"):
        assert paper is not None and high < paper
    if said == "open":
        assert low <= 0 <= high and (paper is None or high >= paper) and max(-low, high) > 1.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrected_intervals_leave_zero_out_exactly_where_holms_procedure_rejects(p):
    adjusted, worst = {}, 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):  # as in Holm (1979): the running maximum of (m - rank) p
        worst = max(worst, (len(p) - rank) * p[i])
        adjusted[i] = worst
    for i, level in enumerate(holm_levels(p)):
        assume(abs(adjusted[i] - 0.05) > 1e-9)
        assert (p[i] <= 1 - level) == (adjusted[i] <= 0.05)
        assert 0.95 <= level < 1


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.floats(-3, 3))
def test_a_p_value_is_that_of_scipy(values, against):
    assume(np.std(values) > 1e-3)
    expected = ttest_1samp(values, against).pvalue
    assert p_value(effect_of(values), against) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_p_value_without_a_spread():
    assert p_value(Effect(3.0, None, 1)) == 1
    assert p_value(Effect(3.0, 0.0, 4)) == 0 and p_value(Effect(0.0, 0.0, 4)) == 1


sets = st.lists(st.tuples(st.floats(-20, 20), st.floats(0.1, 5)), min_size=1, max_size=6)


@given(sets, st.floats(-10, 10))
def test_a_pooled_effect_lies_among_its_own_and_moves_with_them(values, shift):
    own = [Effect(mean, error, 5) for mean, error in values]
    found = pool_effects(own)
    means = [effect.mean for effect in own]
    assert min(means) - 1e-6 <= found.effect.mean <= max(means) + 1e-6 and found.effect.n == len(own)
    assert found.tau >= 0 and 0 <= found.inconsistency <= 1
    moved = pool_effects([effect._replace(mean=effect.mean + shift) for effect in own])
    assert moved.effect.mean == pytest.approx(found.effect.mean + shift, abs=1e-6)
    assert moved.effect.error == pytest.approx(found.effect.error, rel=1e-4, abs=1e-6)
    if len(own) == 1:
        assert found.effect.error == pytest.approx(own[0].error)


def test_a_sure_data_set_counts_more_until_they_differ():
    alike = pool_effects([Effect(1.0, 0.1, 5), Effect(1.3, 2.0, 5), Effect(0.8, 2.0, 5)])
    assert alike.tau == 0 and abs(alike.effect.mean - 1.0) < 0.02
    apart = pool_effects([Effect(0.0, 0.1, 5), Effect(10.0, 1.0, 5), Effect(20.0, 1.0, 5)])
    assert apart.tau > 5 and 9 < apart.effect.mean < 11 and apart.inconsistency > 0.9
