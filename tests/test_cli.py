"The command `selfdetr` as a shell sees it: tables, files, one-line errors and exit statuses."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import some_model
from small_runs import SMALL

import selfdetr.check.folder as check_module
from selfdetr import inference, video
from selfdetr.check.folder import check_folder
from selfdetr.check.tables import import_segments
from selfdetr.cli import main
from selfdetr.cli.arguments import Parser, number, run_command
from selfdetr.data import files
from selfdetr.data.dataset import load_dataset
from selfdetr.data.releases import read_settings
from selfdetr.data.files import find_data
from selfdetr.data.windows import WindowConfig
from selfdetr.detector import Detector, save_detector
from selfdetr.diagnosis import diagnose
from selfdetr.evaluation import Evaluation, evaluate
from selfdetr.inference import InferenceConfig
from selfdetr.checkpoint import save_model
from selfdetr.report import picture_formats
from selfdetr.settings import choose_settings
from selfdetr.study import spec
from selfdetr.trainer import TrainConfig


# One command.


def test_help_is_quick_and_judging_does_not_load_torch(tmp_path):
    "Half a second for the help on an idle machine; here only what is imported is looked at, in one process."
    code = "import sys, selfdetr.cli as cli\nfor line in sys.argv[1:]:\n    try: cli.main(line.split())\n"
    code += "    except SystemExit: pass\n    print('IMPORTED', *sys.modules)\n"
    heavy, drawing = {"torch", "pandas", "matplotlib"}, {"torch", "matplotlib", "seaborn"}
    calls = {"--help": heavy, "data --help": heavy, "detect --help": heavy, "features --help": heavy,
             "evaluate --help": drawing, "data check --help": {"torch", "matplotlib"},
             "evaluate TRUTH DETECTIONS --recall --diagnose --json JSON": drawing | {"scipy.stats"}}
    truth = {"database": {"a": {"annotations": [{"label": "run", "segment": [1, 2]}]}}}
    detections = {"results": {"a": [{"label": "run", "segment": [1, 2], "score": 0.5}]}}
    (tmp_path / "TRUTH").write_text(json.dumps(truth)), (tmp_path / "DETECTIONS").write_text(json.dumps(detections))
    command = [sys.executable, "-c", code, *calls]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = [set(line.split()) for line in done.stdout.splitlines() if line.startswith("IMPORTED ")]
    assert {call: absent & names for (call, absent), names in zip(calls.items(), imported, strict=True)} == {
        call: set() for call in calls}
    assert "diagnosis" in json.loads((tmp_path / "JSON").read_text()) and "selfdetr.diagnosis" in imported[-1]


@pytest.mark.parametrize("arguments, message", [
    ("", "required: COMMAND"),
    ("trian", "invalid choice: 'trian'"),
    ("data", "required: COMMAND"),
    ("data chek", "invalid choice: 'chek'")])
def test_a_command_that_is_none_is_one_line(capsys, arguments, message):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr: error: ") and error.count("\n") == 1 and message in error


# selfdetr evaluate


@pytest.fixture
def judged(tmp_path):
    "Annotations of two videos and detections that find half of them."
    rng = np.random.default_rng(0)
    database, results = {}, {}
    for name in ("a", "b"):
        starts = rng.uniform(0, 90, 6).round(1)
        items = [{"segment": [s, s + 5], "label": "xy"[i % 2]} for i, s in enumerate(starts)]
        database[name] = {"subset": "test", "duration": 100.0, "annotations": items}
        moved = [{**item, "segment": [s + d, s + 5]} for item, s, d in zip(items, starts, (0, 1, 4) * 2)]
        results[name] = [{**item, "score": score} for item, score in zip(moved, rng.random(6).round(3))]
    paths = tmp_path / "truth.json", tmp_path / "found.json"
    paths[0].write_text(json.dumps({"database": database}))
    paths[1].write_text(json.dumps({"results": results}))
    return [str(path) for path in paths]


def test_it_prints_what_evaluate_finds(judged, capsys):
    assert main(["evaluate", *judged, "--per-class"]) == 0
    result = evaluate(*judged)
    shown = capsys.readouterr()
    assert shown.out == result.markdown(per_class=True) and shown.err == ""
    assert f"{100 * result.average:.2f}" in shown.out and 0 < result.average < 1


def test_it_writes_all_that_is_asked_for(judged, tmp_path, capsys):
    wanted = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    options = ["--json", wanted["json"], "--markdown", wanted["md"], "--plot", wanted["png"], "--recall", "--diagnose"]
    assert main(["evaluate", *judged, *map(str, options)]) == 0
    content = json.loads(wanted["json"].read_text())
    result = evaluate(*judged)
    assert Evaluation.from_dict(content).mAP.equals(result.mAP) and {"AR", "AUC", "recall"} <= set(content)
    assert content["diagnosis"] == json.loads(json.dumps(diagnose(*judged).to_dict()))
    text = wanted["md"].read_text()
    assert text == capsys.readouterr().out and "AR@100" in text and "background" in text
    assert wanted["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("TRUTH lost.json", "lost.json: cannot be read"),
        ("TRUTH FOUND --tiou", "expected at least one argument"),
        ("TRUTH TRUTH", "truth.json has no 'results' section"),
        ("FOUND FOUND", "found.json: has no videos; write"),
        ("TRUTH FOUND --subset dev", "no video is in subset 'dev'; the subsets in the file: 'test'"),
        ("TRUTH FOUND --protocol activitynet13", "no video is in subset 'validation'; the subsets in the file: 'test'"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_2(judged, capsys, arguments, message):
    assert main(["evaluate", *arguments.replace("TRUTH", judged[0]).replace("FOUND", judged[1]).split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr: error: ") and shown.err.count("\n") == 1 and message in shown.err
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
    assert main(["evaluate", "lost.json", "lost.too.json", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr: error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_judged_as_its_study_judges_it(tiny_folder, folds_folder, tmp_path, capsys):
    place, found = Path(shutil.copytree(tiny_folder, tmp_path / "data")), tmp_path / "found.json"
    inference.write_results(load_dataset(place).ground_truth("test").assign(score=0.5), found)
    about = json.loads((place / "dataset.json").read_text())
    for change in ({}, {"protocol": "thumos14-212"}):
        (place / "dataset.json").write_text(json.dumps(about | change))
        assert main(["evaluate", str(place), str(found), "--diagnose"]) == 0
        shown = capsys.readouterr().out
        assert "coverage" in shown and "without a duration" not in shown and "average mAP 100.0" in shown
        assert f"Protocol {change.get('protocol', '')}" in shown
    for folder, options, message in (
        (place, ["--subset", "training"], "of a folder the test split counts"),
        (folds_folder, [], "has 3 folds; name one with --fold: 1, 2, 3"),
    ):
        assert main(["evaluate", str(folder), str(found), *options]) == 2
        assert message in capsys.readouterr().err


def test_help_names_the_protocols(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0 and "thumos14-212" in capsys.readouterr().out.replace("\n", "")


def with_training_videos(judged):
    "The annotations with three more videos, which a detector was trained on."
    content = json.loads(Path(judged[0]).read_text())
    for i in range(3):
        content["database"][f"t{i}"] = content["database"]["a"] | {"subset": "Training"}
    Path(judged[0]).write_text(json.dumps(content))


def test_a_subset_is_chosen_and_what_counts_as_missed_is_said(judged, capsys):
    expected = evaluate(*judged)
    with_training_videos(judged)
    assert main(["evaluate", *judged]) == 0
    everything = capsys.readouterr().out
    assert "without a detection (3 of subset 'Training')" in everything and "--subset): 3" not in everything
    assert f"{100 * expected.average:.2f}" not in everything
    for subset in ("test", "TEST"):
        assert main(["evaluate", *judged, "--subset", subset, "--recall", "--diagnose"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"Protocol all, subset {subset}.\n") and "without a detection" not in shown
        assert expected.markdown().split("\n", 2)[2] in shown
    assert main(["evaluate", *judged, "--protocol", "activitynet13", "--subset", "test", "training"]) == 0
    assert "Protocol activitynet13, subset test + training." in capsys.readouterr().out


def test_names_that_do_not_meet_are_said_before_the_table(judged, capsys):
    content = json.loads(Path(judged[1]).read_text())
    renamed = {f"v_{name}": rows for name, rows in content["results"].items()}
    Path(judged[1]).write_text(json.dumps({"results": renamed}))
    assert main(["evaluate", *judged, "--diagnose", "--recall"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("**Nothing in common: no video") and "'v_a', annotated 'a'" in shown.out.split("\n")[0]
    assert shown.err == ""


def test_each_file_is_read_once(judged, monkeypatch):
    read, texts = [], files.read_text
    monkeypatch.setattr(files, "read_text", lambda path: read.append(str(path)) or texts(path))
    assert main(["evaluate", *judged, "--recall", "--diagnose"]) == 0
    assert read == judged


@pytest.mark.parametrize("ending", picture_formats())
def test_pictures_are_written_in_each_format_that_is_offered(judged, tmp_path, ending):
    path = tmp_path / "new" / f"out.{ending.upper()}"
    assert main(["evaluate", *judged, "--plot", str(path)]) == 0
    assert path.stat().st_size > 500 and len(list(path.parent.iterdir())) == 1


def test_the_installed_command_gives_published_numbers():
    folder = find_data("detections")
    if folder is None:
        pytest.skip("the released detections with their published mAP are not here")
    judged = [str(folder / f"autoloc_thumos14_{part}.json") for part in ("ground_truth", "detections")]
    command = [sys.executable, "-m", "selfdetr", "evaluate", *judged, "--tiou", "0.3", "0.5", "0.7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "| 35.77 | 21.21 | 5.8 |" in done.stdout, done.stderr


PUBLISHED = {  # average mAP over folds, of frame-wise predictions as detections
    "50salads": {"mid_video_SVM": 29.8, "mid_video_tCNN_C36": 36.6, "mid_video_DilatedTCN_B3_L5": 41.1,
                 "mid_video_ED-TCN_L2_C15": 46.7},
    "gtea": {"video_SVM": 21.4, "video_DilatedTCN_L5_B2": 35.7, "video_ED-TCN_L2_C25": 48.1},
    "jigsaws": {"video_ED-TCN_L2_C20": 66.8, "sensors_ED-TCN_L2_C15": 73.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_predictions_of_other_methods_have_their_known_average_over_folds(name, tmp_path):
    folder = find_data(name)
    if folder is None:
        pytest.skip(f"the folds of {name} with the predictions of other methods are not here")
    for method, expected in PUBLISHED[name].items():
        averages = []
        for predicted in sorted(folder.glob(f"fold*/peers/{method}.json")):
            judged = [str(predicted.parents[1] / "annotations.json"), str(predicted)]
            assert main(["evaluate", *judged, "--subset", "test", "--json", str(tmp_path / "out.json")]) == 0
            averages.append(100 * json.loads((tmp_path / "out.json").read_text())["average"])
        assert len(averages) >= 3 and f"{np.mean(averages):.1f}" == str(expected), method


@pytest.mark.parametrize("text, value", [("7", 7), ("1" * 400, None), ("-3", None), ("7.0", None), ("1_0", None)])
def test_whole_numbers_of_any_length(text, value, capsys):
    "Python's whole numbers have no end, its floating-point numbers have."
    parser, read = Parser("tool"), []
    parser.add_argument("--many", type=number(int, least=0, below=2**63))
    parser.set_defaults(work=lambda options: read.append(options.many))
    status = run_command(parser, [f"--many={text}"])
    assert (status, read) == ((0, [value]) if value else (2, []))
    assert value or "give a whole number from 0 below" in capsys.readouterr().err

# selfdetr data check, selfdetr data import


NAMES = "video,start,end,label"
ROWS = [("a", 1, 3, "run"), ("a", 5, 8.5, "jump"), ("b", 0, 2, "run"), ("c", 2, 4, "jump")]


def segments(path, header=NAMES, rows=ROWS):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows), ""]))
    return path


def stored(folder):
    return json.loads((folder / "annotations.json").read_text())["database"]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    "A data set, to be damaged."
    copy = tmp_path / "sports"
    shutil.copytree(tiny_folder, copy)
    return copy


def test_the_command_prints_the_findings_and_ends_in_0_or_2(folder, tmp_path, capsys):
    wanted = [tmp_path / "out.json", tmp_path / "out.md"]
    outputs = ["--json", str(wanted[0]), "--markdown", str(wanted[1])]
    assert main(["data", "check", str(folder), "--window", "64", *outputs]) == 0
    shown, findings = capsys.readouterr(), check_folder(folder, window=64)
    assert shown.out == f"{findings}\n" and shown.err == ""
    assert json.loads(wanted[0].read_text()) == findings.to_dict() and wanted[1].read_text() == findings.markdown()
    np.save(next((folder / "features").iterdir()), np.array([{}], dtype=object), allow_pickle=True)
    assert main(["data", "check", str(folder), "--json", str(wanted[0])]) == 2
    shown = capsys.readouterr()
    assert "pickled objects" in shown.out and json.loads(wanted[0].read_text())["ok"] is False
    assert shown.err.startswith("selfdetr: error: sports: cannot be trained on (1 error")
    assert shown.err.count("\n") == 1


def test_folds_that_do_not_go_together_are_an_error_of_the_check(folds_folder, tmp_path, capsys):
    folder = tmp_path / "folds"
    shutil.copytree(folds_folder, folder)
    assert main(["data", "check", str(folder)]) == 0
    shutil.rmtree(folder / "fold2")
    shutil.copytree(folder / "fold1", folder / "fold2")
    assert main(["data", "check", str(folder)]) == 2
    assert "is in the test split of folds 1 and 2" in capsys.readouterr().err


def test_a_report_about_folds_says_which_fold_each_part_is_of(folds_folder, tmp_path):
    report = tmp_path / "report.md"
    assert main(["data", "check", str(folds_folder), "--markdown", str(report)]) == 0
    assert [line for line in report.read_text().splitlines() if line.startswith("# ")] == [
        "# Fold 1", "# Fold 2", "# Fold 3"]


@pytest.mark.parametrize("options, output", [
    ("", "scores.json"), ("--annotations mine.json", "mine.json"), ("--features more", "more/a.npy"),
    ("--video-scores other.json", "other.json")])
def test_a_report_is_written_over_nothing_that_the_check_reads(folder, capsys, options, output):
    (folder / "more").mkdir()
    about = json.loads((folder / "dataset.json").read_text()) | {"video_scores": "scores.json"}
    (folder / "dataset.json").write_text(json.dumps(about))
    for name in ("scores.json", "mine.json", "more/a.npy", "other.json"):
        (folder / name).write_text("mine")
    assert main(["data", "check", str(folder), *options.split(), "--json", str(folder / output)]) == 2
    assert "is read or written by this call already" in capsys.readouterr().err
    assert (folder / output).read_text() == "mine"


def test_the_options_of_the_command_reach_the_check(folder, capsys):
    for path in list((folder / "features").iterdir()):
        path.rename(path.with_name(f"v_{path.name}"))
    command = ["data", "check", str(folder), "--prefix", "v_"]
    assert main([*command, "--snippet", "12", "--stride", "9", "--train", "training"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["stride", "9"] in shown and ["snippet", "12"] in shown
    assert main([*command, "--train", "dev"]) == 2 and "no video is in subset 'dev'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ("check nowhere", "nowhere: no such folder"),
    ("import none.csv x", "none.csv: cannot be read"),
    ("import none.csv x --column verb", "WHAT=NAME"),
    ("check . --window 0", "--window: '0'; give a whole number from 1"),
    ("check . --overlap 1", "--overlap: '1'; give a number from 0 below 1"),
    ("check . --keep 0", "--keep: '0'; give a number above 0 to 1"),
    ("check . --fps 0", "frames a second above 0"),
    ("check . --stride nan", "--stride: 'nan'; give a number above 0"),
    ("check . --min-seconds=-1", "--min-seconds: '-1'; give a number from 0"),
    ("check . --resize 1.5", "--resize: '1.5'; give a whole number from 1"),
    ("check . --release thumos", "choose from"),
    ("check . --windoww 3", "unrecognized arguments: --windoww 3; see selfdetr data check --help"),
    ("chek .", "invalid choice: 'chek'"),
    ("", "required: COMMAND"),
    ("check", "required: folder; see selfdetr data check --help"),
    ("check . --json dataset.json/x", "dataset.json is a file"),
    ("check . --markdown features", "features: is a folder"),
    ("check . --json annotations.json", "annotations.json: is read or written by this call already"),
    ("check . --json new --markdown ./new", "new: is read or written by this call already"),
    ("import t.csv x --test-share 1", "--test-share: '1'; give a number above 0 below 1"),
    ("import t.csv x --seed -1", "--seed: '-1'; give a whole number from 0"),
    ("import t.csv x --fps 25,0", "frames a second above 0"),
    ("import t.csv x --column lable=verb", "columns names 'lable'"),
    ("import t.csv dataset.json", "dataset.json is a file"),
    ("import none.csv x --ignore", "expected one argument")])
def test_what_cannot_be_used_is_one_line_and_status_2(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    segments(folder / "t.csv")
    if "check" in arguments and arguments != "check nowhere":  # the arguments come before the folder
        monkeypatch.setattr(check_module, "check_folder", None)
    assert main(["data", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdetr: error: ") and error.count("\n") == 1 and message in error

def test_options_of_the_import(tmp_path, capsys):
    rows = [("a", "0:01:02", "00:01:03:15", "x"), ("b", 1500, 3000, "x")]
    table = segments(tmp_path / "t.csv", "clip,start,end,verb", rows)
    named = ["--column", "video=clip", "--column", "label=verb"]
    assert main(["data", "import", str(table), str(tmp_path / "y"), "--fps", "30000/1001", *named]) == 0
    import_segments(table, tmp_path / "x", fps=30000 / 1001, columns={"video": "clip", "label": "verb"})
    assert stored(tmp_path / "y") == stored(tmp_path / "x") and "2 videos" in capsys.readouterr().out
    assert main(["data", "import", str(table), str(tmp_path / "z"), "--fps", "0", *named]) == 2
    table = segments(tmp_path / "t.csv", f"{NAMES},onset", [(*row, 0) for row in ROWS])
    assert main(["data", "import", str(table), str(tmp_path / "z"), "--ignore", "Onset"]) == 2
    assert main(["data", "import", str(table), str(tmp_path / "z"), "--ignore", "onset"]) == 0


# selfdetr detect


OPTIONS, WINDOWS = InferenceConfig(batch=5), WindowConfig(length=32)


@pytest.fixture(scope="module")
def dataset(tiny_folder):
    return load_dataset(tiny_folder, standardised=True)


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    "The folder of a model for that data."
    folder = save_model(some_model(), tmp_path_factory.mktemp("model"))
    save_detector(folder, dataset, OPTIONS, WINDOWS)
    return folder


@pytest.fixture(scope="module")
def detector(made):
    return Detector.load(made, "cpu")


@pytest.fixture(scope="module")
def recordings(tiny_folder, dataset):
    "The feature recordings of the test recordings, as they were before standardisation."
    return [tiny_folder / "features" / f"{video.name}.npy" for video in dataset.split("test")]


def change_detector(folder, **values):
    path = folder / "detector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_command_writes_what_the_detector_finds(made, detector, recordings, tmp_path, capsys):
    target = tmp_path / "new" / "found.json"
    assert main(["detect", str(made), str(recordings[0].parent), "-o", str(target), "--device", "cpu"]) == 0
    results = json.loads(target.read_text())["results"]
    every = sorted(recordings[0].parent.iterdir())
    expected = detector.detect_many(every)
    assert set(results) == {path.stem for path in every} and sum(map(len, results.values())) == len(expected)
    for name, entries in results.items():
        own = expected[expected.video == name]
        times = np.array([(*e["segment"], e["score"]) for e in entries])
        assert np.allclose(times, own[["start", "end", "score"]], atol=1e-5)
    shown = capsys.readouterr()
    assert f"{len(expected)} detections" in shown.out and shown.err == "" and [*target.parent.iterdir()] == [target]


def test_options_of_the_command(made, detector, recordings, tmp_path):
    np.save(tmp_path / "a.npy", np.load(recordings[0]).T)
    target, fps = tmp_path / "found.json", detector.config.grid.fps
    options = ["--channels-first", "--top", "3", "--fps", str(fps / 2), "--min-score", "0.01", "--quiet"]
    assert main(["detect", str(made), str(tmp_path / "a.npy"), "-o", str(target), *options]) == 0
    entries, best = json.loads(target.read_text())["results"]["a"], detector.detect(recordings[0]).head(3)
    assert np.allclose([e["segment"] for e in entries], 2 * best[["start", "end"]], atol=1e-5)
    assert main(["detect", str(made), str(recordings[0]), "-o", str(target), "--min-score", "1"]) == 0
    assert json.loads(target.read_text())["results"] == {recordings[0].stem: []}


@pytest.fixture
def place(made, recordings, tmp_path):
    "Files for the command, good and bad, in one folder."
    (tmp_path / "good.npy").write_bytes(recordings[0].read_bytes())
    np.save(tmp_path / "wide.npy", np.zeros((20, 9)))
    np.save(tmp_path / "hole.npy", np.full((20, 8), np.nan))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "good.npy").write_bytes(recordings[0].read_bytes())
    for name, change in {"model": {}, "bad": {"classes": ["a"]}, "resized": {"resize": 48}}.items():
        shutil.copytree(made, tmp_path / name)
        change_detector(tmp_path / name, **change)
    return tmp_path


@pytest.mark.parametrize("arguments, message", [
    ("model lost.npy", "lost.npy"),
    ("model wide.npy", "wide.npy: has 9 channels, the model was trained on 8"),
    ("model pickled.npy", "never loaded"),
    ("model text.csv", "unknown feature format"),
    ("model empty", "no feature file"),
    ("model good.npy twin", "rename one"),
    ("model good.npy hole.npy wide.npy", "hole.npy: has NaN or infinite values in 20 steps, first in step 0"),
    ("model good.npy hole.npy wide.npy", "(and 1 more; --skip-bad"),
    ("model hole.npy wide.npy --skip-bad", "hole.npy"),
    ("bad good.npy", "1 classes, the model has 3"),
    ("nowhere good.npy", "nowhere"),
    ("empty good.npy", "no model"),
    ("resized good.npy", "--fps, --stride and --snippet"),
])  # fmt: skip
def test_what_the_command_refuses(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(["detect", "-o", "found.json", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("arguments, message", [
    ("model good.npy --top 0", "argument --top: '0'; give a whole number from 1"),
    ("model good.npy --top 2.5", "argument --top: '2.5'; give a whole number from 1"),
    ("model good.npy --fps 0", "argument --fps: frame rate '0'"),
    ("model good.npy --fps nan", "argument --fps: frame rate 'nan'"),
    ("model good.npy --stride -1", "argument --stride: '-1'; give a number above 0"),
    ("model good.npy --snippet inf", "argument --snippet: 'inf'; give a number above 0"),
    ("model good.npy --min-score 1.5", "argument --min-score: '1.5'; give a number from 0 to 1"),
    ("model good.npy --min-score -0.1", "argument --min-score: '-0.1'; give a number from 0 to 1"),
    ("model good.npy --min-scores 0.1", "unrecognized arguments: --min-scores 0.1; see selfdetr detect --help"),
    ("model good.npy --device tpu", "device 'tpu'"),
    ("model good.npy --device cuda:99", "device 'cuda:99'"),
    ("model good.npy -o empty", "empty: is a folder; give the name of a file"),
    ("model good.npy -o good.npy/out.json", "good.npy is a file"),
    ("model", "the following arguments are required: features"),
    ("mdoel good.npy", "mdoel"),
    ("bad good.npy", "1 classes, the model has 3"),
    ("resized good.npy", "--fps, --stride and --snippet"),
])  # fmt: skip
def test_wrong_options_are_refused_before_any_feature_is_read(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(inference, "open_features", lambda *_: pytest.fail("features were read"))
    before = sorted(place.rglob("*"))
    assert main(["detect", "-o", "found.json", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and sorted(place.rglob("*")) == before


def test_a_rate_may_be_a_fraction(made, detector, recordings, tmp_path):
    target = tmp_path / "found.json"
    assert main(["detect", str(made), str(recordings[0]), "-o", str(target), "--fps", "30000/1001", "--quiet"]) == 0
    entries = json.loads(target.read_text())["results"][recordings[0].stem]
    expected = detector.detect(recordings[0], fps=30000 / 1001)
    assert np.allclose([e["segment"] for e in entries], expected[["start", "end"]], atol=1e-5)


def test_bad_files_are_skipped_when_asked_for(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main("detect model wide.npy good.npy hole.npy -o found.json --skip-bad".split()) == 0
    shown = capsys.readouterr()
    assert set(json.loads(Path("found.json").read_text())["results"]) == {"good"}
    assert shown.err.count("skipped: ") == 2 and "wide.npy" in shown.err and "hole.npy" in shown.err
    assert main("detect resized good.npy -o found.json --fps 10 --stride 1 --snippet 1".split()) == 0


def test_of_a_folder_hidden_files_are_no_features(made, recordings, tmp_path, capsys):
    folder = tmp_path / "features"
    folder.mkdir()
    shutil.copy(recordings[0], folder)
    (folder / f"._{recordings[0].name}").write_text("what macOS adds")
    assert main(["detect", str(made), str(folder), "-o", str(tmp_path / "found.json")]) == 0
    (folder / "bad.npy").write_text("no array")
    assert main(["detect", str(made), str(folder), "-o", str(tmp_path / "found.json")]) == 2
    assert "(--skip-bad goes on without them)" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["{features}/{name}", "{model}/config.json"])
def test_the_command_writes_over_nothing_that_it_reads(made, recordings, output, capsys):
    path = Path(output.format(features=recordings[0].parent, name=recordings[0].name, model=made))
    before = path.read_bytes()
    assert main(["detect", str(made), str(recordings[0].parent), "-o", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is read or written by this call already" in error and error.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("arguments, message", [
    ("MODEL lost.npy", "lost.npy: no such file or folder of features"),
    ("lost FEATURES", "lost: no such folder; check the path"),
    ("MODEL/config.json FEATURES", "config.json: is a file; give the folder of the model"),
])  # fmt: skip
def test_a_misspelt_path_is_named(made, recordings, tmp_path, capsys, arguments, message):
    given = arguments.replace("MODEL", str(made)).replace("FEATURES", str(recordings[0])).split()
    assert main(["detect", *given, "-o", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err

# selfdetr train


@pytest.mark.parametrize("options, message", [
    ("--seed -1", "argument --seed: '-1'; give a whole number from 0"),
    ("--seed " + "1" * 23, "argument --seed: "),
    ("--seed 1.5", "argument --seed: '1.5'; give a whole number from 0"),
    ("--sed 1", "unrecognized arguments: --sed 1"),
    ("--profile quik", "argument --profile: invalid choice: 'quik'"),
    ("--preset tadter", "argument --preset: invalid choice: 'tadter'"),
    ("--set model.quieres=3", "override 'model.quieres': no such field; did you mean 'model.queries'?"),
    ("--set modle.queries=3", "override 'modle.queries': no such field; did you mean 'model.queries'?"),
    ("--set train.epochs=many", "override 'train.epochs'"),
    ("--set train.epochs=0", "TrainConfig.epochs is 0; it must be positive"),
    ("--set model.heads=5", "dim is 32; it must be divisible by heads"),
    ("--set train.epochs", "argument --set: 'train.epochs'; write part.field=value"),
    ("--device cuda:99", "device 'cuda:99'"),
    ("--device cudax", "device 'cudax'"),
    ("--runs FILE/runs", "a file is a file"),
    ("-o FILE", "a file: exists; give a new folder, or delete it"),
    ("-o FILE/model", "a file is a file"),
    ("--set inference.voting=2", "voting and cut from 0 to 1 are needed"),
    ("--data-root", "argument --data-root: expected one argument"),
])  # fmt: skip
def test_wrong_options_are_one_line_before_any_data_are_read(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spec, "open_dataset", lambda *_: pytest.fail("the data were read"))
    (tmp_path / "a file").touch()
    arguments = [option.replace("FILE", str(tmp_path / "a file")) for option in options.split()]
    assert main(["train", "simulated", "--profile", "smoke", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_misspelt_data_set_is_one_line_with_the_near_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "thumos41", "--profile", "smoke"]) == 2
    said = capsys.readouterr().err
    assert "data set 'thumos41': no such folder in data" in said and "did you mean 'thumos14'?" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def train(tiny_folder, tmp_path, capsys):
    "Trains on the tiny folder with few steps; returns the lines that were printed."
    quick = {"train.epochs": 1, "model.dim": 16, "model.heads": 2, "model.norm_groups": 2, "model.hidden": 16}

    def call(*arguments, status=0):
        given = [f"--set={name}={value}" for name, value in quick.items()]
        runs = ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
        assert main(["train", str(tiny_folder), *given, *runs, *map(str, arguments)]) == status
        shown = capsys.readouterr()
        return (shown.err if status else shown.out).splitlines()

    return call


def test_a_folder_is_trained_on_with_settings_of_its_own_and_the_model_is_copied(train, tiny_folder, tmp_path, capsys):
    length, queries, judged, last = train("-o", tmp_path / "new" / "model")
    chosen = {choice.name: choice for choice in choose_settings(load_dataset(tiny_folder), train=TrainConfig(batch=8))}
    assert length == f"windows.length = {chosen['windows.length'].value}: {chosen['windows.length'].reason}"
    assert queries.startswith("model.queries = 40: a training window has up to ")  # the epochs were given
    [run] = (tmp_path / "runs").glob("[!.]*")
    metrics, model = json.loads((run / "metrics.json").read_text()), tmp_path / "new" / "model"
    each = ", ".join(f"{value:.1f} at {tiou}" for tiou, value in metrics["mAP"].items())
    assert judged == f"mAP on {metrics['test_instances']} test instances: {each} tIoU" and len(metrics["mAP"]) > 3
    assert last.startswith(f"{model}: average mAP {metrics['average']:.2f} %, ")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {p.name: p.read_bytes() for p in run.iterdir()}
    found, options = json.loads((model / "spec.json").read_text()), Detector.load(model, "cpu").config
    assert found["windows"]["random"] and found["loss"]["quality"] and found["loss"]["feedback_encoder"] == 0
    assert (found["profile"], found["train"]["epochs"]) == ("standard", 1)
    assert options.windows.length == chosen["windows.length"].value and len(options.mean) == 8
    assert (options.inference.cut, options.inference.voting, options.inference.most) == (0.3, 0.75, 1000)
    target = tmp_path / "found.json"
    assert main(["detect", str(model), str(tiny_folder / "features"), "-o", str(target), "--device", "cpu"]) == 0
    assert len(json.loads(target.read_text())["results"]) == 5


def test_a_folder_with_something_in_it_is_refused_before_the_training(train, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(spec, "open_dataset", lambda *_: pytest.fail("the data were read"))
        [line] = train("-o", tmp_path / "full", status=2)
    assert f"{tmp_path / 'full'}: exists; give a new folder, or delete it" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    train("-o", tmp_path / "empty")
    assert Detector.load(tmp_path / "empty", "cpu").config.classes


def test_preset_and_profile_are_taken_and_only_the_standard_profile_chooses(train, tmp_path):
    lines = train("--profile", "smoke", "--preset", "self-detr")
    assert len(lines) == 2 and lines[0].startswith("mAP on ")
    found = json.loads((Path(lines[-1].split(":")[0]) / "spec.json").read_text())
    assert (found["profile"], found["windows"]["length"], found["windows"]["random"]) == ("smoke", 64, False)
    assert found["loss"]["feedback_encoder"] > 0 and found["model"]["cross_attention"] == "standard"
    lines = train("--preset", "tadtr", "--set", "windows.length=32")
    assert [line.split(" = ")[0] for line in lines[:-2]] == ["model.queries"]
    found = json.loads((Path(lines[-1].split(":")[0]) / "spec.json").read_text())
    assert found["windows"]["length"] == 32 and found["model"]["cross_attention"] == "deformable"


def test_a_run_is_on_one_fold(folds_folder, tmp_path, capsys):
    given = ["train", str(folds_folder), "--profile", "smoke", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    given += [f"--set={name}={value}" for name, value in SMALL.items()]
    for options, message in ((), "a run is on one; name a fold: 1, 2, 3"), (["--fold", "5"], "has no fold '5'"):
        assert main([*given, *options]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert main([*given, "--fold", "2"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1].split(":")[0])
    assert json.loads((folder / "spec.json").read_text())["fold"] == "2"


def test_settings_of_a_name_are_for_its_steps_a_second(tiny_folder, tmp_path, capsys):
    """The settings of `vts` are in steps, for 10 steps a second; the small folder has others."""
    folder = tmp_path / "vts"
    shutil.copytree(tiny_folder, folder)
    given = ["train", str(folder), "--device", "cpu", "--runs", str(tmp_path / "runs"), "--set", "train.epochs=1"]
    assert main([*given, *(f"--set={name}={value}" for name, value in SMALL.items())]) == 0
    assert "windows.length = " in capsys.readouterr().out
    with pytest.warns(UserWarning, match="the settings of 'vts' are for another number of steps a second"):
        spec.open_folds(str(folder), "smoke")


# selfdetr features


@pytest.fixture
def films(tmp_path):
    "A folder of three short videos."
    av = pytest.importorskip("av", reason="the packages of selfdetr[video] are not installed")
    folder = tmp_path / "films"
    folder.mkdir()
    for i, name in enumerate(("a.mp4", "b.mkv", "c.avi")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 48
            for frame in range(40 + 10 * i):
                picture = np.full((48, 48, 3), 255 * (frame == 20), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def test_the_command(films, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["films", "-o", "data", "--model", f"hub:{hub}:small", "--weights", "none", "--batch", "4"]
    assert main(["features", *arguments]) == 0
    out = capsys.readouterr()
    assert out.out == "data: 3 videos done, 0 complete before, 0 failed\n"
    assert "RANDOM WEIGHTS" in out.err and "100%" in out.err
    Path("films/bad.mp4").write_text("not a video")
    assert main(["features", *arguments, "--device", "cpu"]) == 1
    out = capsys.readouterr()
    assert out.out == "data: 0 videos done, 3 complete before, 1 failed\n"
    assert out.err.splitlines()[-1].startswith("selfdetr: error: films/bad.mp4: cannot be decoded")
    assert main(["features", *arguments, "--overwrite"]) == 1 and "3 videos done, 0 complete" in capsys.readouterr().out
    assert main(["features", *arguments, "--stride", "16"]) == 2
    assert "has features with stride 4, these would have 16" in capsys.readouterr().err
    assert main(["features", "films/a.mp4", *arguments[1:2], "halves", *arguments[3:], "--half", "--fps", "30000/1001",
                       "--snippet", "8", "--stride", "2"]) == 0
    assert np.load("halves/features/a.npy").dtype == np.float16
    assert read_settings(Path("halves")) == {
        "fps": 30000 / 1001, "stride": 2, "snippet": 8,
        "description": {"model": f"hub:{hub}:small", "weights": "random", "float16": True}}


@pytest.mark.parametrize("arguments, says", [
    (["films"], "required: -o/--output"),
    ([], "required: VIDEO_OR_FOLDER"),
    (["film"], "film: no such file or folder"),
    (["empty"], "empty: holds no videos"),
    (["films", "more"], "would both be 'a'; rename one"),
    (["films", "--stride", "0"], "--stride: '0'; give a whole number from 1"),
    (["films", "--snippet", "1.5"], "--snippet: '1.5'; give a whole number from 1"),
    (["films", "--fps=-25"], "--fps: frame rate '-25'; give frames a second above 0"),
    (["films", "--fps", "1/0"], "--fps: frame rate '1/0'"),
    (["films", "--fps", "nan"], "--fps: frame rate 'nan'"),
    (["films", "--batch", "many"], "--batch: 'many'; give a whole number from 1"),
    (["films", "--model", "r3d"], "there is no video network 'r3d'; choose one of mc3_18"),
    (["films", "--weights", "BEST"], "r3d_18 has no weights 'BEST'; choose KINETICS400_V1, DEFAULT or none"),
    (["films", "--model", "hub:{hub}:small", "--weights", "defualt"], "has no weights 'defualt'; give DEFAULT"),
    (["films", "--device", "tpu9"], "device 'tpu9'"),
    (["films", "--device", "cuda:99"], "device 'cuda:99'"),
    (["films", "-o", "films/a.mp4"], "a.mp4 is a file"),
    (["films", "-o", "films/a.mp4/data"], "a.mp4 is a file"),
    (["films", "-o", "half"], "half/features is a file"),
    (["films", "-o", "other"], "dataset.json"),
    (["films", "--resume"], "unrecognized arguments: --resume"),
])
def test_wrong_arguments_are_one_line_and_status_2(films, hub, arguments, says, capsys, monkeypatch):
    if "r3d" in says:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:  # not installed, or built for another PyTorch
            pytest.skip(f"torchvision cannot be imported: {error}")
    monkeypatch.chdir(films.parent)
    monkeypatch.setattr(video, "_opened", None)  # no video is opened
    if "-o" in arguments:
        monkeypatch.setattr(video, "make_extractor", None)  # no weights are loaded
    arguments = [each.format(hub=hub) for each in arguments]
    for name, content in {"half/features": "", "other/dataset.json": "{"}.items():
        Path(name).parent.mkdir()
        Path(name).write_text(content)
    Path("empty").mkdir()
    Path("more").mkdir()
    Path("more/a.mov").touch()
    output = ["-o", "data"] if arguments != ["films"] and "-o" not in arguments else []
    assert main(["features", *arguments, *output]) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1 and says in out.err
    assert out.err.startswith("selfdetr: error: ") and not Path("data").exists()
