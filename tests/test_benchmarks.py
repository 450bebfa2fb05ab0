"""Every benchmark runs, on sizes that say nothing about speed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "eager"))


@pytest.fixture
def script(monkeypatch, name):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(script, name, capsys, one_thread):
    if name == "read_releases" and script.find_data("thumos14") is None:
        pytest.skip("the annotations of THUMOS14 are not here")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0 and "--smoke" in capsys.readouterr().out
    script.main(["--smoke"])
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_a_benchmark_is_a_script():
    done = subprocess.run([sys.executable, FOLDER / "several.py", "--smoke", "--json"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    clock, processor = json.loads(done.stdout)
    assert len(clock) == len(processor) == 2


@pytest.mark.parametrize("name", ["several"])
@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--device", "tpu"], ["--speed", "1"]], ids=" ".join)
def test_wrong_options_are_refused(script, wrong):
    with pytest.raises(SystemExit) as stop:
        script.main(wrong)
    assert stop.value.code == 2
