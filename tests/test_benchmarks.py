"""Every benchmark runs, on sizes that say nothing about speed."""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
from nbclient.exceptions import CellTimeoutError

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "eager", "gpu"))


@pytest.fixture
def script(monkeypatch, name):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", [*SCRIPTS, "gpu"])
def test_a_benchmark_is_a_script_with_help(script, capsys):
    assert Path(script.__file__).read_text().endswith('if __name__ == "__main__":\n    main()\n')
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0 and "--smoke" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(script, name, capsys, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "read_releases" and script.find_data("thumos14") is None:
        pytest.skip("the annotations of THUMOS14 are not here")
    script.main(["--smoke"])
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize("name", ["gpu"])
def test_the_gpu_does_every_part(script, capsys, tmp_path, monkeypatch):
    """What the parts call is replaced: the scripts run above, `reproduce` in test_notebooks, `correctness` below."""
    called = lambda name: SimpleNamespace(main=lambda argv: print(name, *argv))  # noqa: E731
    monkeypatch.setattr(script, "importlib", SimpleNamespace(import_module=called))
    monkeypatch.setattr(script, "reproduce", lambda seeds, options, left: pd.Series([9.0] * 4 * seeds))
    monkeypatch.setitem(script.PARTS, "correctness", (lambda options, left: f"{options.size}, {options.device}", 0))
    script.main(["--smoke", "--out", str(tmp_path)])
    written = {path.stem: path.read_text().split("\n", 1) for path in tmp_path.glob("*.txt")}
    assert list(script.PARTS) == ["correctness", *script.SCRIPTS, "table3"] and set(written) == set(script.PARTS)
    assert not any("FAILED" in head for head, _ in written.values()) and "FAILED" not in capsys.readouterr().out
    assert {name: written[name][1].strip() for name in script.SCRIPTS} == {n: f"{n} --smoke" for n in script.SCRIPTS}
    assert "1 seeds: " in written["table3"][1] and "unfinished" not in written["table3"][1]


@pytest.mark.parametrize("name", ["gpu"])
def test_what_the_gpu_has_done_is_not_done_again(script, capsys, one_thread, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PARTS", {name: script.PARTS[name] for name in ("correctness", "inference")})
    (tmp_path / "inference.txt").write_text("device another, code of yesterday\n")
    script.main(["--smoke", "--out", str(tmp_path)])
    assert "is there already" not in capsys.readouterr().out
    script.main(["--smoke", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("is there already") == 2
    assert "MISSED" not in (tmp_path / "correctness.txt").read_text()
    script.main(["--smoke", "--out", str(tmp_path / "late"), "--minutes", "0.001"])
    assert capsys.readouterr().out.count("left out") == 2


@pytest.mark.parametrize("name", ["gpu"])
def test_a_part_that_fails_is_written_down_and_the_next_begins(script, capsys, one_thread, tmp_path, monkeypatch):
    def fails(options, left):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(script, "PARTS", {"first": (fails, 1), "inference": script.PARTS["inference"]})
    script.main(["--smoke", "--out", str(tmp_path)])
    assert "no kernel image" in (tmp_path / "first.txt").read_text() and "windows/s" in capsys.readouterr().out
    script.main(["--smoke", "--out", str(tmp_path)])
    assert "first: FAILED" in capsys.readouterr().out  # tried again


@pytest.mark.parametrize("name", ["gpu"])
def test_a_table_that_lacks_seeds_is_continued(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    now = [0.0]
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked, saved = [], tmp_path / "results" / "simulated-full" / "table3.json"
    saved.parent.mkdir(parents=True)

    def reproduce(seeds, options, left):
        assert not saved.is_file() or int(saved.read_text()) < seeds, "a table of more seeds is not replaced"
        saved.write_text(str(seeds))
        asked.append(seeds)
        now[0] += 10
        return pd.Series([9.0] * 4 * seeds)

    monkeypatch.setattr(script, "reproduce", reproduce)
    monkeypatch.setattr(script, "SEEDS", 3)
    monkeypatch.setattr(script, "PARTS", {"table3": (script.table3, 0)})
    options = SimpleNamespace(smoke=False, workers=4, device="cpu", out=str(tmp_path), results=tmp_path / "results")
    said = [script.compute("table3", options, now[0] + left) for left in (25, 5, 60, 60)]
    assert "unfinished: 2 of 3" in said[0] and "unfinished" not in said[2] and "is there already" in said[3]
    assert asked == [1, 2, 1, 1, 2, 3]


@pytest.mark.parametrize("name", ["gpu"])
def test_a_saved_table_stays_where_no_seed_is_finished(script, tmp_path, monkeypatch):
    options = SimpleNamespace(smoke=True, workers=1, device="cpu", out=str(tmp_path))
    saved = script.place_of_table(options)[1] / "table3.json"
    saved.parent.mkdir()
    saved.write_text("of five seeds")
    for error in (CellTimeoutError, KeyboardInterrupt):
        monkeypatch.setattr(script, "reproduce", Mock(side_effect=error))
        with nullcontext() if error is CellTimeoutError else pytest.raises(error):
            assert "unfinished: 0 of 1 seeds" in script.table3(options, left=9)
        assert saved.read_text() == "of five seeds"


@pytest.mark.parametrize("name", ["gpu"])
def test_a_table_that_does_not_fit_the_time_is_left_unfinished(script, one_thread, tmp_path):
    options = SimpleNamespace(smoke=True, workers=1, device="cpu", out=str(tmp_path))
    assert "unfinished: 0 of 1 seeds" in script.table3(options, left=1)


@pytest.mark.parametrize("name", ["several"])
def test_a_run_in_a_process_of_its_own_prints_its_times(script, capsys, one_thread):
    """test_scale starts a script as another process does."""
    script.main(["--smoke", "--json"])
    clock, processor = json.loads(capsys.readouterr().out)
    assert len(clock) == len(processor) == 2


@pytest.mark.parametrize("name", ["several"])
@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--device", "tpu"], ["--speed", "1"]], ids=" ".join)
def test_wrong_options_are_refused(script, wrong):
    with pytest.raises(SystemExit) as stop:
        script.main(wrong)
    assert stop.value.code == 2
