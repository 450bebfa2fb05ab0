"""Claims about layers, margins and one row, by hand."""

from pathlib import Path

import pandas as pd

from selfdetr.study import Run, RunSpec
from selfdetr.study.statistics import judge_claim


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
    assert judge_claim(falls, runs)["verdict"] == "reproduced"  # +2.0, +2.1, +1.9
    raises = {"text": "raises", "better": "b", "worse": "a", "of": "decoder 2"}
    assert "+1.07 d(A)" in judge_claim(raises, runs)["evidence"]
    same = {"text": "no gain", "better": "b", "worse": "a"}  # +0.5, +0.4, +0.6: clearly higher, by less than 1
    assert judge_claim(same, runs)["verdict"] == "reproduced"
    assert judge_claim(same | {"margin": 1.0}, runs)["verdict"] == "reproduced"
    assert judge_claim(same | {"margin": 0.1}, runs)["verdict"] == "not reproduced"
    assert judge_claim(same | {"margin": 0.5}, runs)["verdict"] == "inconclusive"


def test_a_claim_on_folds_is_paired_by_fold_and_seed_and_counts_folds():
    "Three folds with two seeds each; the differences are 1 and 3, 2 and 2, 4 and 0."
    def runs(averages):
        pairs = [(fold, seed) for fold in "123" for seed in (0, 1)]
        return [Run(Path("unused"), RunSpec(fold=fold, seed=seed), {"average": average}, pd.DataFrame())
                for (fold, seed), average in zip(pairs, averages)]  # fmt: skip

    by_row = {"a": runs([10, 20, 30, 40, 50, 60]), "b": runs([11, 23, 32, 42, 54, 60])}
    better = {"text": "better", "better": "b", "worse": "a"}  # each fold by 2: no spread
    assert judge_claim(better, by_row) == {
        "text": "better", "verdict": "reproduced",
        "evidence": "+2.0 mAP, 95 % interval [+2.0, +2.0], 3 folds x 2 seeds"}  # fmt: skip
    published = judge_claim({"text": "as printed", "better": "a", "worse": 20.0}, by_row)  # -5, 15, 35: 15 +- 49.7
    assert published["evidence"] == "+15.0 mAP, 95 % interval [-34.7, +64.7], 3 folds x 2 seeds"
    one = {row: each[:2] for row, each in by_row.items()}  # of one fold: paired by seed, 2 +- 12.7
    assert judge_claim(better, one)["evidence"] == "+2.0 mAP, 95 % interval [-10.7, +14.7], 1 fold x 2 seeds"
