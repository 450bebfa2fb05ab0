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
