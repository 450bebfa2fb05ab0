"""Tables: requests that are refused, statistics against SciPy, whole files, the page of all claims."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from small_runs import ROWS, make_table, strict_json

from selfdetr import study
from selfdetr.data import DataError
from selfdetr.study import Run, RunSpec, compute, tables
from selfdetr.study.evidence import gather_claims
from selfdetr.study.tables import _markdown


pytestmark = pytest.mark.usefixtures("no_pictures_left")


def fake_runs(averages, seeds, folds=("",)):
    "Runs as the cache would return them, in the order of `run_all`: all rows of a fold and seed, then the next pair."
    pairs = [(fold, seed) for fold in folds for seed in seeds]
    diversity = [{"part": "encoder", "layer": 1, "diversity": 1.0}]
    metrics = [
        {
            "average": row[i],
            "mAP": {"0.5": row[i] + 1, "0.7": row[i] - 1},
            "test_instances": 9 + len(fold) * i,
            "diversity": diversity,
            "protocol": "all",
        }
        for i, (fold, _) in enumerate(pairs)
        for row in averages
    ]
    specs = [RunSpec(fold=fold, seed=seed) for fold, seed in pairs for _ in averages]
    return [Run(Path("unused"), spec, m, pd.DataFrame()) for spec, m in zip(specs, metrics)]


def fake_table(averages, tiny_folder, seeds=None, rows=None, folds=None, **more):
    seeds = seeds or list(range(len(averages[0]) // len(folds or [""])))
    rows = rows or [{"name": f"row {i}", "overrides": {}, "paper": None} for i in range(len(averages))]
    claims = [{"text": "better", "better": rows[1]["name"], "worse": rows[0]["name"]}]

    def run_all(specs, *_, **__):
        runs = fake_runs(averages, seeds, folds or [""])
        assert [(spec.fold, spec.seed) for spec in specs] == [(run.spec.fold, run.spec.seed) for run in runs]
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "run_all", run_all)
        more |= dict(claims=claims, name="table9", title="A test.", folds=folds)
        return make_table(rows, seeds, tiny_folder, "unused", **more)


def test_unknown_names_stop_a_table_before_any_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("training was started"))
    wrong_row = {"name": "wrong", "overrides": {"loss.feedbak": 1}, "paper": None}
    cases = [
        (dict(profile="quik"), ROWS, 1, "profile 'quik'.*smoke, quick, standard, full"),
        (dict(dataset="thumos15"), ROWS, 1, "data set 'thumos15'"),
        ({}, [*ROWS, wrong_row], 1, "'loss.feedbak'.*loss.feedback_encoder"),
        ({}, [ROWS[0], ROWS[0]], 1, "different names"),
        ({}, ROWS, 0, "at least one seed"),
    ]
    for options, rows, seeds, message in cases:
        options = {"data_root": tmp_path / "data"} | options
        with pytest.raises(ValueError, match=message) as caught:
            make_table(rows, seeds, tiny_folder, tmp_path / "runs", **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError):
        study.open_dataset("thumos15", "quick", tmp_path)


def test_a_claim_about_an_unknown_row_stops_a_table_before_any_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("training was started"))
    with pytest.raises(ValueError, match="'bothh'"):
        make_table(ROWS, 1, tiny_folder, tmp_path, claims=[{"text": "t", "better": "bothh", "worse": "baseline"}])
    with pytest.raises(ValueError, match="seed"):
        make_table(ROWS, [0, 0], tiny_folder, tmp_path)  # the same numbers twice would pass for evidence


def table_options(dataset, out_dir, seeds=2):
    names = dict(dataset=str(dataset), profile="smoke", data_root="", seeds=seeds, device="cpu", workers=1,
                 out_dir=str(out_dir), cluster="")  # fmt: skip
    return study.check_parameters(names)


def test_results_of_other_data_or_of_more_seeds_are_not_replaced(tiny_folder, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_folder, tmp_path / "other" / tiny_folder.name)
    path = min((other / "features").iterdir())
    np.save(path, np.load(path) + 1)
    folder, options = table_options(tiny_folder, tmp_path)
    fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder).save(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    trained = []

    def trains(specs, *_, **__):
        trained.append(len(specs))
        return fake_runs([[1], [2]], [0])

    monkeypatch.setattr(tables, "run_all", trains)
    again = dict(rows=ROWS, name="table9", **options)
    with pytest.raises(DataError, match=r"table9\.json: .*2 seeds.* 1 .*seeds=2.*another out_dir"):
        study.table(seeds=1, **again)
    results, options = table_options(other, tmp_path)
    assert results == folder
    with pytest.raises(DataError, match=rf"table9\.json: .* other data of the name '{tiny_folder.name}'.*out_dir"):
        study.table(seeds=2, **again | options)
    assert not trained and {path: path.read_bytes() for path in folder.iterdir()} == kept
    for more in (dict(seeds=[5, 6]), dict(seeds=1, name="table8"), dict(seeds=1, results=tmp_path / "look")):
        study.table(**again | more)
    (folder / "table9.json").write_text("{")  # cut off: nothing to protect
    study.table(seeds=1, **again)
    assert trained == [4, 2, 2, 2]


def test_simulated_data_may_be_made_by_newer_code(tmp_path, monkeypatch):
    "The embedded benchmark is what the code makes; there are no two of it."
    folder, options = table_options("simulated", tmp_path, 1)
    options |= {"data_root": str(tmp_path / "data")}
    monkeypatch.setattr(tables, "run_all", lambda *_, **__: fake_runs([[1.0], [2.0]], [0]))
    made = study.table(ROWS, 1, name="table9", **options)
    made.content["data"] = "of older code"
    made.save(folder)
    study.table(ROWS, 1, name="table9", **options)


scores = st.lists(st.tuples(*[st.floats(0, 100)] * 2), min_size=2, max_size=6)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=scores)
def test_differences_and_verdicts_are_the_paired_t_test(tiny_folder, pairs):
    base, ours = (list(x) for x in zip(*pairs))
    assume(np.std(np.subtract(ours, base)) > 1e-3)
    content = fake_table([base, ours], tiny_folder).content
    expected, delta = ttest_rel(ours, base), content["rows"][1]["delta"]
    low, high = expected.confidence_interval(0.95)
    assert delta["mean"] == pytest.approx(np.mean(ours) - np.mean(base), abs=1e-9)
    assert (delta["low"], delta["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assume(abs(expected.pvalue - 0.05) > 1e-6)
    clear = "confirmed" if expected.statistic > 0 else "contradicted"
    unclear = "within 1.5 of nothing" if max(-low, high) <= 1.5 else "open"
    assert content["claims"][0]["verdict"] == (clear if expected.pvalue < 0.05 else unclear)
    assert content["rows"][0]["delta"] is None and content["rows"][1]["average"] == ours


def test_table_files_hold_to_their_contract(tiny_folder, tmp_path):
    rows = [
        {"name": "baseline", "overrides": {"loss.feedback_encoder": 0}, "paper": {"0.5": 50.0, "average": 50.3}},
        {"name": "both", "overrides": {}, "paper": None},
    ]
    table = fake_table([[20.0, 30.0, 25.0], [24.0, 33.5, 30.0]], tiny_folder, [4, 7, 9], rows)
    assert table.save(tmp_path / "results") == tmp_path / "results"
    names = [f"table9.{kind}" for kind in ("csv", "json", "md", "png")]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == names  # and no part of a file
    content = strict_json(tmp_path / "results" / "table9.json")
    assert {"table", "dataset", "profile", "seeds", "metric", "rows", "claims"} <= set(content)
    names = [content[k] for k in ("table", "dataset", "profile", "seeds")]
    assert names == ["table9", "tiny", "smoke", [4, 7, 9]]
    for row, asked in zip(content["rows"], rows):
        assert set(row) == {"name", "overrides", "paper", "mAP", "average", "delta"}
        assert {k: row[k] for k in asked} == asked and len(row["average"]) == 3
        assert row["mAP"] == {"0.5": [v + 1 for v in row["average"]], "0.7": [v - 1 for v in row["average"]]}
    assert content["rows"][0]["delta"] is None and set(content["rows"][1]["delta"]) == {"mean", "low", "high"}
    keys = {"text", "whose", "verdict", "evidence", "mean", "error", "n", "unit", "paper", "margin"}
    assert [set(c) for c in content["claims"]] == [keys]
    assert content["claims"][0]["verdict"] == "confirmed"  # +4, +3.5, +5
    csv = pd.read_csv(tmp_path / "results" / "table9.csv", index_col=0)
    markdown = (tmp_path / "results" / "table9.md").read_text()
    assert list(csv.index) == ["baseline", "both"] and all(r["name"] in markdown for r in rows)
    assert "confirmed" in markdown and "4, 7, 9" in markdown and "+4.2" in markdown
    assert (tmp_path / "results" / "table9.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_a_table_without_interval_and_verdict(tiny_folder, tmp_path):
    table = fake_table([[20.0], [30.0]], tiny_folder)
    table.save(tmp_path)
    content = json.loads((tmp_path / "table9.json").read_text())
    assert content["rows"][1]["delta"] == {"mean": 10.0, "low": None, "high": None}
    assert content["claims"][0]["verdict"] == "open"
    assert "nan" not in (tmp_path / "table9.md").read_text().lower()


def test_a_simulated_table_says_so(tiny_folder):
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder)
    assert "simulated" not in _markdown(table)
    table.content["dataset"] = "simulated"
    assert "**simulated**" in _markdown(table)


def test_a_table_says_what_the_papers_numbers_come_from(tiny_folder):
    rows = [{"name": name, "overrides": {}, "paper": None} for name in ("baseline", "both")]
    rows[1]["paper"] = {"average": 56.7}
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder, rows=rows)
    assert "95 % interval. `paper avg`: THUMOS14, I3D features; not comparable" in _markdown(table)
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder, rows=rows, published="TSN features")
    table.content["dataset"] = "thumos14"
    assert "95 % interval. `paper avg`: TSN features.\n\n|" in _markdown(table)
    table.content["rows"][1]["paper"] = None
    assert "95 % interval.\n\n|" in _markdown(table)


def test_a_crash_while_saving_leaves_the_old_table_whole(tiny_folder, tmp_path, monkeypatch):
    old, new = (fake_table([[20.0, 21.0], [b, 33.0]], tiny_folder) for b in (30.0, 31.0))
    old.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(handle):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", half)
    with pytest.raises(OSError, match=r"table9\.json: cannot be written .*No space left.* make room there"):
        new.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before
    assert {p.name for p in tmp_path.iterdir()} == set(before)


def test_all_claims_of_all_data_sets_are_on_the_page(tiny_folder, tmp_path):
    better, worse = (fake_table(a, tiny_folder) for a in ([[1, 2], [3, 4.1]], [[3, 4.1], [1, 2]]))
    worse.content |= {"dataset": "other", "source": "of another version"}
    for table in (better, worse):
        table.save(tmp_path / f"{table.content['dataset']}-smoke")
    page = study.write_claims(tmp_path).read_text()
    assert "that were judged: 1. Verdicts, counted once per data set: 1 (1 confirmed). " in page
    assert "Verdicts of earlier code or settings: 1 (1 contradicted)." in page
    page = re.sub(" +", " ", page)
    assert "| better | paper | tiny, smoke |" in page and "| better | paper | other, smoke |" in page
    assert (tmp_path / "claims_table9_smoke.png").is_file()
    assert "changed since these were computed: other-smoke" in page
    (tmp_path / "tiny-smoke" / "table9.json").write_text('{"table": ')
    before = (tmp_path / "claims.md").read_bytes()
    with pytest.raises(ValueError, match=r"table9\.json: not a table .* run its notebook again"):
        study.write_claims(tmp_path)
    assert (tmp_path / "claims.md").read_bytes() == before


# ---- folds

FOLDED = [[20.0, 22.0, 30.0, 34.0, 50.0, 51.0], [24.0, 23.0, 33.0, 36.0, 53.0, 56.0]]  # of 3 folds, 2 seeds each


def test_a_table_of_folds_pairs_by_fold_and_seed_and_reports_each_fold(folds_folder, tmp_path):
    table = fake_table(FOLDED, folds_folder, folds=list("123"))
    table.save(tmp_path)
    content = strict_json(tmp_path / "table9.json")
    base, ours = content["rows"]
    assert (content["folds"], content["seeds"]) == (["1", "2", "3"], [0, 1])
    assert [base["average"], ours["average"]] == FOLDED and ours["mAP"]["0.5"] == [v + 1 for v in FOLDED[1]]
    assert content["test_instances"] == 9 + 11 + 13  # each fold once
    means = [np.reshape(row, (3, 2)).mean(axis=1) for row in FOLDED]
    expected = ttest_rel(means[1], means[0])
    between = expected.confidence_interval(0.95)
    assert list(ours["delta"].values()) == pytest.approx([3.0, *between])
    assert content["claims"][0]["verdict"] == ("confirmed" if expected.pvalue < 0.05 else "open")
    assert table.averages.index.name == "fold" and table.averages["row 1"].tolist() == means[1].tolist()
    assert list(table.frame.n) == ["3 folds x 2 seeds"] * 2
    assert table.per_fold.loc["row 1"].tolist() == ["23.5 (+2.5)", "34.5 (+2.5)", "54.5 (+4.0)"]
    assert table.per_fold.loc["row 0"].tolist() == ["21.0", "32.0", "50.5"]
    assert list(zip(table.diversity.fold, table.diversity.seed)) == [(f, s) for f in "123" for s in (0, 1)] * 2
    by_fold = pd.read_csv(tmp_path / "table9_folds.csv", index_col=0)
    pd.testing.assert_frame_equal(by_fold.astype(str), table.per_fold.astype(str))
    page = (tmp_path / "table9.md").read_text()
    assert "folds 1, 2, 3, seeds 0, 1." in page and "over folds, each the mean of its seeds" in page
    assert "with the same fold and seed" in page and "| 34.5 (+2.5) |" in page


def test_one_fold_is_a_table_of_seeds(folds_folder):
    table = fake_table([[20.0, 22.0], [24.0, 23.0]], folds_folder, folds=["2"])
    assert table.content["folds"] == ["2"] and table.per_fold.empty and table.averages.index.name == "seed"
    assert list(table.frame.n) == ["1 fold x 2 seeds"] * 2
    delta, between = table.content["rows"][1]["delta"], ttest_rel([24.0, 23.0], [20.0, 22.0]).confidence_interval(0.95)
    assert (delta["low"], delta["high"]) == pytest.approx(tuple(between))
    assert "over seeds" in _markdown(table) and "by fold" not in _markdown(table)


def test_results_of_other_folds_are_not_replaced(folds_folder, tmp_path):
    folder = shutil.copytree(folds_folder, tmp_path / folds_folder.name)
    options = {"results": (results := tmp_path / "results")}
    fake_table(FOLDED, folder, folds=list("123"), **options).save(results)
    again = fake_table(FOLDED, folder, folds=list("123"), **options)
    assert len(again.content["data"]) == 64
    two = [row[:4] for row in FOLDED]
    with pytest.raises(DataError, match=r"table9\.json: has folds 1, 2, 3, here folds 1, 2; give those, or another"):
        fake_table(two, folder, folds=["1", "2"], **options)
    with pytest.raises(DataError, match=r"table9\.json: has folds 1, 2, 3, here no folds; give those, or another out"):
        fake_table(two, folder / "fold1", **options)
    with pytest.raises(DataError, match=r"table9\.json: holds 2 seeds, which 1 would replace"):
        fake_table([row[:3] for row in FOLDED], folder, folds=list("123"), **options)
    path = min((folder / "fold3" / "features").iterdir())
    np.save(path, np.load(path) + 1)  # one file of one fold
    with pytest.raises(DataError, match=r"table9\.json: of other data of the name 'folded'"):
        fake_table(FOLDED, folder, folds=list("123"), **options)


# ---- an inner split


def test_a_table_on_an_inner_split_reads_no_test_recording(tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    data = study.open_dataset(str(folder), "smoke")
    table = make_table(ROWS[:1], 1, folder, tmp_path / "runs", inner=True)
    held = max(video.name for video in data.split("train"))
    detected = json.loads((table.runs["baseline"][0].folder / "detections.json").read_text())["results"]
    assert list(detected) == [held] and table.runs["baseline"][0].spec.inner and table.content["inner"]
    assert table.content["test_instances"] == len(data.ground_truth("train").query("video == @held"))
    assert f"{table.content['test_instances']} instances of an inner split of the training" in _markdown(table)
    database = json.loads((folder / "annotations.json").read_text())["database"]
    for video in data.split("test"):
        database[video.name]["annotations"] = database[video.name]["annotations"][:1]
        np.save(folder / "features" / f"{video.name}.npy", np.zeros((video.steps, data.channels), np.float32))
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("training was started"))
    again = make_table(ROWS[:1], 1, folder, tmp_path / "runs", inner=True)
    assert again.content == table.content


def test_a_table_of_test_recordings_does_not_say_inner(tiny_folder):
    table = fake_table([[50.0, 51.0], [52.0, 53.0]], tiny_folder)
    assert table.content["inner"] is False and "test instances, seeds" in _markdown(table)


def test_a_table_of_other_settings_or_code_is_old(tmp_path):
    claim = {
        "text": "a is better",
        "whose": "ours",
        "verdict": "open",
        "evidence": "",
        "mean": 1.0,
        "error": None,
        "n": 1,
    }
    about = {"table": "table9", "title": "", "dataset": "simulated", "profile": "quick", "seeds": [0], "rows": []}
    now = {"source": compute.source_hash(), "settings": tables.settings_hash("simulated", "quick")}
    for number, change in enumerate(({}, {"settings": "0"}, {"source": "0"}, {"profile": "no longer there"})):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "table9.json").write_text(json.dumps(about | now | change | {"claims": [claim]}))
    assert gather_claims(tmp_path).old.tolist() == [False, True, True, True]
    assert "changed since these were computed: simulated-no longer there" in study.write_claims(tmp_path).read_text()
