"""Notebooks with parameters: what the form of the study writes and refuses; the page on the collapse, small."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "reproduce_table3.ipynb"
PARTS = "diversity encoder_maps decoder_maps cross_maps losses timeline".split()
PICTURES = ("table3", *(f"table3_{part}" for part in PARTS))


def test_the_smoke_run_writes_every_promised_file(tmp_path, monkeypatch):
    """Started as `make gpu` starts it, which keeps the executed notebook beside them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    seconds = gpu.reproduce(2, SimpleNamespace(smoke=True, out=str(tmp_path), device="cpu"), left=600)
    assert len(seconds) == 8 and (seconds > 0).all()
    results = tmp_path / "simulated-smoke"
    written = {p.name: p.stat().st_size for p in results.iterdir()}
    files = {f"table3.{ending}" for ending in ("json", "csv", "md", "ipynb")}
    files |= {"table3_diversity.csv", "table3_depth.csv"}
    assert set(written) == files | {f"{name}.png" for name in PICTURES}
    assert all(size > 100 for size in written.values()) and all(written[f"{n}.png"] > 5000 for n in PICTURES)
    table = json.loads((results / "table3.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["baseline", "encoder", "decoder", "both"]
    assert table["seeds"] == [0, 1] and all(len(row["average"]) == 2 for row in table["rows"])
    verdicts = {"confirmed", "confirmed, smaller", "contradicted", "open"}
    verdicts |= {"within 1.5 of nothing", "no effect of that size"}
    assert {claim["verdict"] for claim in table["claims"]} <= verdicts
    assert len(list((tmp_path / "runs").glob("[!.]*"))) == 8
    assert "simulated" in (results / "table3.md").read_text()


@pytest.mark.parametrize("notebook", sorted(NOTEBOOK.parent.glob("reproduce_*.ipynb")), ids=lambda path: path.stem)
def test_a_bad_parameter_is_one_clear_error_and_writes_nothing(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    exec("".join(cells[0]["source"]), names)
    with pytest.raises(ValueError, match="unknown parameter sedes"):
        exec("".join(cells[1]["source"]), names | {"sedes": 3})
    assert not list(tmp_path.iterdir())


def test_what_the_page_on_the_collapse_asserts_holds_in_a_small_run(tmp_path):
    page, done = NOTEBOOK.with_name("50_collapse.ipynb"), tmp_path / "out.ipynb"
    small = {"dataset": "simulated", "profile": "smoke"}
    papermill.execute_notebook(str(page), str(done), small, cwd=str(page.parent), progress_bar=False)
    asserting = [cell for cell in json.loads(done.read_text())["cells"] if "assert " in "".join(cell["source"])]
    assert len(asserting) > 5 and all(cell["metadata"]["papermill"]["status"] == "completed" for cell in asserting)
