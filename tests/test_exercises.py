"""The solutions of the exercises, run after the cells of their notebooks as a reader runs them."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
SOLUTION = re.compile(r"<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


def cells(name, kind):
    content = json.loads((NOTEBOOKS / name).read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def solutions(name):
    return [code for text in cells(name, "markdown") for code in SOLUTION.findall(text)]


# The last of them takes longest. It comes first: a process that has few tests left is given another file to wait.
with_exercises = sorted((path.name for path in NOTEBOOKS.glob("*.ipynb") if solutions(path.name)), reverse=True)


def test_what_other_tests_leave_to_this_one_has_exercises():
    [left] = re.findall(r"^EXERCISES = (.*)$", (NOTEBOOKS.parent / "Makefile").read_text(), re.MULTILINE)
    assert set(with_exercises) == {path.name for path in NOTEBOOKS.glob("*.ipynb") if re.search(left, path.name)}


@pytest.mark.parametrize("name", with_exercises)
def test_solutions_hold(name, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    names = {"__name__": "__main__"}
    for i, code in enumerate([*cells(name, "code"), *solutions(name)]):
        exec(compile(code, f"{name}, cell {i}", "exec"), names)
        plt.close("all")
    asserted = [code for code in solutions(name) if "assert" in code]
    assert len(asserted) == len(solutions(name))
