"The commands as a shell sees them: tables, files, one-line errors and exit statuses."

import json
import subprocess
import sys

import numpy as np
import pytest

from selfdetr.command import Parser, number, run_command
from selfdetr.data import find_data
from selfdetr.diagnosis import diagnose, main
from selfdetr.evaluation import Evaluation, evaluate


@pytest.fixture
def files(tmp_path):
    "Annotations of two videos and detections that find half of them."
    rng = np.random.default_rng(0)
    database, results = {}, {}
    for video in ("a", "b"):
        starts = rng.uniform(0, 90, 6).round(1)
        items = [{"segment": [s, s + 5], "label": "xy"[i % 2]} for i, s in enumerate(starts)]
        database[video] = {"subset": "test", "duration": 100.0, "annotations": items}
        moved = [{**item, "segment": [s + d, s + 5]} for item, s, d in zip(items, starts, (0, 1, 4) * 2)]
        results[video] = [{**item, "score": score} for item, score in zip(moved, rng.random(6).round(3))]
    paths = tmp_path / "truth.json", tmp_path / "found.json"
    paths[0].write_text(json.dumps({"database": database}))
    paths[1].write_text(json.dumps({"results": results}))
    return [str(path) for path in paths]


def test_it_prints_what_evaluate_finds(files, capsys):
    assert main([*files, "--per-class"]) == 0
    result = evaluate(*files)
    shown = capsys.readouterr()
    assert shown.out == result.markdown(per_class=True) and shown.err == ""
    assert f"{100 * result.average:.2f}" in shown.out and 0 < result.average < 1


def test_it_writes_all_that_is_asked_for(files, tmp_path, capsys):
    wanted = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    options = ["--json", wanted["json"], "--markdown", wanted["md"], "--plot", wanted["png"], "--recall", "--diagnose"]
    assert main([*files, *map(str, options)]) == 0
    content = json.loads(wanted["json"].read_text())
    result = evaluate(*files)
    assert Evaluation.from_dict(content).mAP.equals(result.mAP) and {"AR", "AUC", "recall"} <= set(content)
    assert content["diagnosis"] == json.loads(json.dumps(diagnose(*files).to_dict()))
    text = wanted["md"].read_text()
    assert text == capsys.readouterr().out and "AR@100" in text and "background" in text
    assert wanted["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("TRUTH lost.json", "lost.json: cannot be read"),
        ("TRUTH FOUND --protocol thumos", "unknown protocol 'thumos': choose one of thumos14-212"),
        ("TRUTH FOUND --tiou 50", "above 0 and at most 1"),
        ("TRUTH TRUTH", "no 'results' section"),
        ("TRUTH FOUND --json TRUTH/out.json", "truth.json"),  # a file where a folder is needed
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_2(files, capsys, arguments, message):
    assert main(arguments.replace("TRUTH", files[0]).replace("FOUND", files[1]).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr-eval: error: ") and error.count("\n") == 1 and message in error


def test_an_unknown_option_is_status_2_and_help_names_the_protocols(capsys):
    for arguments, status in ((["--wrong"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == status
    assert "thumos14-212" in capsys.readouterr().out.replace("\n", "")


def test_the_installed_command_gives_published_numbers():
    folder = find_data("detections")
    if folder is None:
        pytest.skip("the released detections with their published mAP are not here")
    files = [str(folder / f"autoloc_thumos14_{part}.json") for part in ("ground_truth", "detections")]
    code = "import sys; from selfdetr.diagnosis import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *files, "--tiou", "0.3", "0.5", "0.7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "| 35.77 | 21.21 | 5.8 |" in done.stdout, done.stderr


@pytest.mark.parametrize("text, value", [("7", 7), ("1" * 400, None), ("-3", None), ("7.0", None), ("1_0", None)])
def test_whole_numbers_of_any_length(text, value, capsys):
    "Python's whole numbers have no end, its floating-point numbers have."
    parser, read = Parser("tool"), []
    parser.add_argument("--many", type=number(int, least=0, below=2**63))
    status = run_command(parser, lambda options: read.append(options.many), [f"--many={text}"])
    assert (status, read) == ((0, [value]) if value else (2, []))
    assert value or "give a whole number from 0 below" in capsys.readouterr().err
