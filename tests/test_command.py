"The commands as a shell sees them: tables, files, one-line errors and exit statuses."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfdetr import data
from selfdetr.command import Parser, number, run_command
from selfdetr.data import find_data
from selfdetr.diagnosis import PICTURES, diagnose, main
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
        ("TRUTH FOUND --tiou", "expected at least one argument"),
        ("TRUTH TRUTH", "truth.json has no 'results' section"),
        ("FOUND FOUND", "found.json has no 'database' section"),
        ("TRUTH FOUND --subset dev", "no video is in subset 'dev'; the subsets in the file: 'test'"),
        ("TRUTH FOUND --protocol activitynet13", "no video is in subset 'validation'; the subsets in the file: 'test'"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_2(files, capsys, arguments, message):
    assert main(arguments.replace("TRUTH", files[0]).replace("FOUND", files[1]).split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr-eval: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--protocol thumos", "unknown protocol 'thumos': choose one of thumos14-212"),
        ("--protocol thumos14_211", "did you mean thumos14-211?"),
        ("--tiou 50", "give a number above 0 to 1"),
        ("--tiou 0.5 nan", "'nan'; give a number above 0 to 1"),
        ("--tiou 0.5 0", "'0'; give a number above 0 to 1"),
        ("--plot out.xyz", "out.xyz: nothing is written in this format; end the name in .eps"),
        ("--plot out", "out: nothing is written in this format"),
        ("--plot FILE/out.png", "FILE is a file"),
        ("--json FOLDER", "is a folder; give the name of a file"),
        ("--markdown FILE/out.md", "FILE is a file"),
        ("--json out --markdown ./out", "out: is read or written by this call already"),
        ("--json lost.json", "lost.json: is read or written by this call already"),
        ("--diagnose --protocol thumos14-challenge", "errors are diagnosed by activitynet's"),
        ("--wrong", "unrecognized arguments: --wrong"),
    ],
)
def test_options_are_checked_before_the_files_are_read(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    put = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "file")}
    for name, place in put.items():
        options, message = options.replace(name, place), message.replace(name, place)
    assert main(["lost.json", "lost.too.json", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr-eval: error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_names_the_protocols(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "thumos14-212" in capsys.readouterr().out.replace("\n", "")


def with_training_videos(files):
    "The annotations with three more videos, which a detector was trained on."
    content = json.loads(Path(files[0]).read_text())
    for i in range(3):
        content["database"][f"t{i}"] = content["database"]["a"] | {"subset": "Training"}
    Path(files[0]).write_text(json.dumps(content))


def test_a_subset_is_chosen_and_what_counts_as_missed_is_said(files, capsys):
    expected = evaluate(*files)
    with_training_videos(files)
    assert main(files) == 0
    everything = capsys.readouterr().out
    assert "without a detection (3 of subset 'Training')" in everything and "--subset): 3" not in everything
    assert f"{100 * expected.average:.2f}" not in everything
    for subset in ("test", "TEST"):
        assert main([*files, "--subset", subset, "--recall", "--diagnose"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"Protocol all, subset {subset}.\n") and "without a detection" not in shown
        assert expected.markdown().split("\n", 2)[2] in shown
    assert main([*files, "--protocol", "activitynet13", "--subset", "test", "training"]) == 0
    assert "Protocol activitynet13, subset test + training." in capsys.readouterr().out


def test_names_that_do_not_meet_are_said_before_the_table(files, capsys):
    content = json.loads(Path(files[1]).read_text())
    Path(files[1]).write_text(json.dumps({"results": {f"v_{name}": rows for name, rows in content["results"].items()}}))
    assert main([*files, "--diagnose", "--recall"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("**Nothing in common: no video") and "'v_a', annotated 'a'" in shown.out.split("\n")[0]
    assert shown.err == ""


def test_each_file_is_read_once(files, monkeypatch):
    read, texts = [], data.read_text
    monkeypatch.setattr(data, "read_text", lambda path: read.append(str(path)) or texts(path))
    assert main([*files, "--recall", "--diagnose"]) == 0
    assert read == files


@pytest.mark.parametrize("ending", PICTURES)
def test_pictures_are_written_in_each_format_that_is_offered(files, tmp_path, ending):
    path = tmp_path / "new" / f"out.{ending.upper()}"
    assert main([*files, "--plot", str(path)]) == 0
    assert path.stat().st_size > 500 and len(list(path.parent.iterdir())) == 1


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
