"""Data sets of action segmentation, read as they are unpacked: what is read, what is refused, what is imported."""

import json
import shutil

import numpy as np
import pytest
from checking import SMALL
from hypothesis import given
from hypothesis import strategies as st

from selfdetr.check.folder import check_folder, files_of
from selfdetr.check.tables import import_labels
from selfdetr.cli.commands import main
from selfdetr.data import DataError, folds_of, load_dataset, load_fold, read_annotations
from selfdetr.data.files import find_data
from selfdetr.data.framewise import BACKGROUND, label_entry, read_framewise, runs_of
from selfdetr.study import open_dataset, open_folds

TESTS = {"1": ("a", "b"), "2": ("c", "d")}  # by split
LENGTHS = {"a": 300, "b": 200, "c": 90, "d": 250, "e": 60}  # labels; e is in no bundle
COMPOSED, DECOMPOSED = "r\u00fchren", "ru\u0308hren"


def bundle(folder, number, tests, names):
    (folder / "splits").mkdir(exist_ok=True)
    for subset, those in (("test", tests), ("train", [name for name in names if name not in tests])):
        text = "".join(f"{name}.txt\n" for name in those)
        (folder / "splits" / f"{subset}.split{number}.bundle").write_text(text)


@pytest.fixture
def salads(tmp_path):
    "Five recordings, 10 labels and steps a second, and two splits of four of them."
    folder, random = tmp_path / "salads", np.random.default_rng(0)
    for part in ("features", "groundTruth"):
        (folder / part).mkdir(parents=True)
    (folder / "mapping.txt").write_text("0 stir\n1 cut\n2 background\n")
    for name, length in LENGTHS.items():
        labels = [("background", "cut", "stir")[frame // 20 % 3] for frame in range(length)]
        (folder / "groundTruth" / f"{name}.txt").write_text("\n".join([*labels, ""]))
        np.save(folder / "features" / f"{name}.npy", random.normal(size=(6, length)).astype(np.float32))
    for number, tests in TESTS.items():
        bundle(folder, number, tests, "abcd")
    return folder


# What is read

SETS = {"50salads": (3, 1), "gtea": (15, 3), "jigsaws": (10, 2)}  # labels a second that state all times, stride


def write_labels(path, entry, fps):
    labels = ["background"] * round(entry.duration * fps)
    for item in entry.annotations:
        start, end = (round(time * fps) for time in item["segment"])
        labels[start:end] = [item["label"]] * (end - start)
    path.write_text("\n".join([*labels, ""]))


@pytest.mark.filterwarnings("ignore:.*fps is")  # the annotation files state the rate of the features
@pytest.mark.parametrize("name", SETS)
def test_real_data_in_the_layout_is_the_same_data(tmp_path, name):
    source = find_data(name)
    if source is None:
        pytest.skip(f"the {name} data is not on this machine")
    fps, stride = SETS[name]
    first, folds = load_fold(source, 1), folds_of(source)
    for part in ("features", "groundTruth"):
        (tmp_path / part).mkdir()
    mapping = [*first.classes, "background"]
    (tmp_path / "mapping.txt").write_text("".join(f"{number} {label}\n" for number, label in enumerate(mapping)))
    for video in first.videos:
        write_labels(tmp_path / "groundTruth" / f"{video.name}.txt", first.entries[video.name], fps)
        np.save(tmp_path / "features" / f"{video.name}.npy", first.features(video.name).T)
    truth = {fold: read_annotations(source / f"fold{fold}") for fold in folds}
    for fold, annotations in truth.items():
        bundle(tmp_path, fold, [video.name for video in annotations.split("test")], list(annotations.entries))
    assert folds_of(tmp_path) == folds
    for fold, annotations in truth.items():
        found = read_framewise(tmp_path, fps, fold=fold)
        for split in ("train", "test"):
            assert found.ground_truth(split).equals(annotations.ground_truth(split)), (fold, split)
    grid = dict(fps=fps, stride=stride, snippet=stride)
    loaded, same = load_fold(tmp_path, 1, **grid), load_fold(source, 1, **grid)
    assert loaded.hash() == same.hash() and loaded.channels == 128 and "length" not in loaded.report
    assert (name != "50salads") or load_dataset(tmp_path, fps=3, fold=1).hash() == first.hash()


@given(
    runs=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 400)), min_size=1, max_size=20),
    fps=st.sampled_from([1, 10, 15, 25, 29.97, 30, 60]),
)
def test_instances_are_the_runs_and_say_which_frames(tmp_path_factory, runs, fps):
    labels = [label for label, count in runs for _ in range(count)]
    path = tmp_path_factory.getbasetemp() / "labels.txt"
    path.write_text("\n".join(labels))
    entry = label_entry(path, "test", fps, "z")
    painted = ["z"] * round(entry.duration * fps)
    for item in entry.annotations:
        start, end = (round(time * fps) for time in item["segment"])
        painted[start:end] = [item["label"]] * (end - start)
    assert painted == labels and len(entry.annotations) == sum(label != "z" for *_, label in runs_of(labels))


def test_a_folder_in_the_layout_needs_a_frame_rate_only(salads):
    loaded = load_dataset(salads, fps=10, fold=1)
    assert [video.name for video in loaded.videos] == list("abcd")  # e is in no bundle
    assert [video.name for video in loaded.split("test")] == list("ab") and loaded.classes == ("stir", "cut")
    assert loaded.channels == 6 and loaded.videos[0].segments.tolist()[:2] == [[2, 4], [4, 6]]
    assert loaded.summary().endswith("Handled: nothing")
    assert [video.name for video in load_fold(salads, 2, fps=10).split("test")] == list("cd")
    (salads / "dataset.json").write_text(json.dumps({"release": "framewise", "fps": 10, "fold": 1}))
    (salads / "annotations.json").write_text("{}")  # the release that is stated goes before what is there
    assert load_dataset(salads).hash() == loaded.hash() and load_dataset(salads, fold=2).hash() != loaded.hash()
    (salads / "dataset.json").unlink()
    with pytest.raises(DataError, match="annotations.json: has no videos"):
        load_dataset(salads, fps=10)
    assert load_dataset(salads, release="framewise", fps=10, fold=1).hash() == loaded.hash()


def test_one_split_needs_no_choice_and_names_may_have_folders(salads):
    expected = load_dataset(salads, fps=10, fold=1).hash()
    for path in (salads / "splits").glob("*.split2.bundle"):
        path.unlink()
    (salads / "splits" / "train.split1.bundle").write_text("./data/groundTruth/d.txt\r\nc\r\n\r\n")
    assert load_dataset(salads, fps=10).hash() == expected and folds_of(salads) == ["1"]


def test_background_and_classes_can_be_chosen(salads):
    assert load_dataset(salads, fps=10, fold=1, ignore_labels=()).classes == ("stir", "cut", "background")
    assert load_dataset(salads, fps=10, fold=1, ignore_labels="cut").classes == ("stir", "background")
    assert load_dataset(salads, fps=10, fold=1, classes=["cut", "stir"]).classes == ("cut", "stir")
    with pytest.raises(DataError, match="unknown label 'stir'"):
        load_dataset(salads, fps=10, fold=1, classes=["cut"])
    with pytest.raises(DataError, match="selfdetr data import"):
        load_dataset(salads, fps=10, fold=1, protocol="thumos14-210")


def test_labels_are_the_same_in_both_unicode_forms(salads):
    before = load_dataset(salads, fps=10, fold=1)
    for path in (salads / "groundTruth").iterdir():
        path.write_text(path.read_text().replace("stir", COMPOSED).replace("background", f"{DECOMPOSED}-"))
    (salads / "mapping.txt").write_text(f"0 {DECOMPOSED}\n1 cut\n2 {COMPOSED}-\n")
    loaded = load_dataset(salads, fps=10, fold=1, ignore_labels=f"{COMPOSED}-")
    assert loaded.classes == (DECOMPOSED, "cut") and len(loaded.ground_truth(None)) == len(before.ground_truth(None))


def test_features_of_some_frames_and_small_differences(salads):
    for name, length in LENGTHS.items():
        np.save(salads / "features" / f"{name}.npy", np.ones((6, length // 2 - 4 * (name == "b")), np.float32))
    loaded = load_dataset(salads, fps=10, stride=2, snippet=2, fold=1)
    assert loaded.report == {"unused": [], "labels": ["b: 96 steps, 200 labels for 100"]}
    assert loaded.videos[0].grid.to_seconds(0) == 0.1 and "frame-wise labels: 1" in loaded.summary()
    findings = check_folder(salads, fps=10, stride=2, snippet=2, fold=1, **SMALL)
    notes = findings.table[findings.table.kind == "labels"]
    assert findings.ok and notes.item.tolist() == ["video 'b'"] and notes.severity.tolist() == ["note"]
    assert load_dataset(salads, fps=10, resize=50, fold=1).videos[0].steps == 50  # as many as wanted of any length
    assert check_folder(salads, fps=10, resize=50, fold=1, **SMALL).ok


def test_a_recording_without_features_is_reported(salads):
    (salads / "features" / "b.npy").unlink()
    assert load_dataset(salads, fps=10, fold=1).report["no features"] == ["b"]


# What is refused

def write(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


def longer(folder):
    path = folder / "groundTruth" / "a.txt"
    path.write_text(path.read_text() + "cut\n" * 6)


def turned(folder):
    for path in (folder / "features").iterdir():
        np.save(path, np.load(path).T)


TWO = ("splits/test.split2.bundle", "a.txt\nd.txt\n")
REFUSED = {  # fault -> what spoils the folder, options, the file that a finding names, words
    "unknown label": (edit("groundTruth/a.txt", "cut", "cutt"), {}, "groundTruth/a.txt",
                      ["groundTruth/a.txt, line 21", "label 'cutt' is not in mapping.txt", "did you mean 'cut'?"]),
    "unknown split": (None, {"fold": 7}, "splits", ["has no split '7'", "it is one of 1, 2"]),
    "no split chosen": (None, {"fold": None}, "splits", ["has the splits 1, 2", "fold=1 (--fold 1)"]),
    "train and test": (edit("splits/train.split1.bundle", "c", "a"), {}, "splits",
                       ["test.split1.bundle: video 'a' is in train.split1.bundle as well", "keep it in one"]),
    "two test bundles": (write(*TWO), {}, "splits",
                         ["test.split2.bundle: video 'a' is in test.split1.bundle as well"]),
    "listed twice": (edit("splits/test.split1.bundle", "b", "a"), {}, "splits",
                     ["test.split1.bundle, line 2: video 'a' is listed twice"]),
    "no train bundle": (remove("splits/train.split1.bundle"), {}, "splits", ["train.split1.bundle: cannot be read"]),
    "empty bundle": (write("splits/test.split1.bundle", ""), {}, "splits", ["test.split1.bundle: is empty"]),
    "bundle leads out": (write("splits/test.split1.bundle", "x/..\n"), {}, "splits", ["line 1", "'..' is no name"]),
    "no labels": (remove("groundTruth/a.txt"), {}, "groundTruth/a.txt", ["a.txt: no such file, but a bundle names it"]),
    "empty labels": (write("groundTruth/a.txt", "\n"), {}, "groundTruth/a.txt", ["a.txt: is empty"]),
    "empty line": (write("groundTruth/a.txt", "cut\n\ncut\n"), {}, "groundTruth/a.txt", ["line 2 is empty"]),
    "no text": (write("groundTruth/a.txt", b"cut\xff\n"), {}, "groundTruth/a.txt", ["a.txt: is not UTF-8"]),
    "longer labels": (longer, {}, "groundTruth/a.txt",
                      ["a.txt: has 306 labels, so 306 steps at stride 1, but ", "features/a.npy has 300",
                       "(up to 5 steps may differ)"]),
    "wrong stride": (None, {"stride": 2, "snippet": 2}, "groundTruth/a.txt", ['set "stride" to 1']),
    "other axis": (turned, {}, "features", ['"channels_first"']),
    "mapping": (edit("mapping.txt", "1 cut", "cut 1"), {}, "mapping.txt",
                ["mapping.txt, line 2: 'cut 1' is no number and label", "'1 cut'"]),
    "mapping of one number": (edit("mapping.txt", "1 cut", "0 cut"), {}, "mapping.txt", ["line 2: '0 cut' repeats"]),
    "no mapping": (remove("mapping.txt"), {}, "mapping.txt", ["mapping.txt: cannot be read"]),
    "no rate": (None, {"fps": None}, "salads", ["have no frame rate", "dataset.json", "fps=15"]),
    "no such rate": (None, {"fps": 0}, "salads", ["fps is 0", "positive number"]),
}


@pytest.mark.parametrize("spoil, options, item, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_and_found(salads, spoil, options, item, words):
    options = {"fps": 10, "fold": 1} | options
    assert load_dataset(salads, fps=10, fold=1)  # nothing is wrong before
    if spoil:
        spoil(salads)
    with pytest.raises(DataError) as error:
        load_dataset(salads, **options)
    message = str(error.value)
    assert all(word in message for word in words) and message.startswith(str(salads)) and "\n" not in message
    findings = check_folder(salads, **options, **SMALL)
    errors = findings.table[findings.table.severity == "error"]
    assert not findings.ok and item in set(errors.item), str(findings)
    told = " ".join(errors[["item", "problem", "fix"]].to_numpy().ravel())
    assert str(salads) not in told and not errors.problem.str.match(r"\W*[,;:/]").any(), told


def test_a_fold_of_a_data_set_without_splits_is_refused(folder):
    with pytest.raises(DataError, match="has no splits, and fold is 1; leave fold out"):
        load_dataset(folder, fold=1)
    assert not check_folder(folder, fold=1).ok


def test_a_study_opens_every_split_and_holds_the_features_once(salads):
    (salads / "dataset.json").write_text('{"fps": 10}')
    folds = open_folds(str(salads), "smoke")
    assert {fold: tuple(video.name for video in data.split("test")) for fold, data in folds.items()} == TESTS
    assert folds["1"].array is folds["2"].array
    alone = {fold: open_dataset(str(salads), "smoke", fold=fold).hash() for fold in folds}
    assert {fold: data.hash() for fold, data in folds.items()} == alone and len(set(alone.values())) == 2
    with pytest.raises(DataError, match="salads: has 2 folds, and a run is on one; name a fold: 1, 2"):
        open_dataset(str(salads), "smoke")


# What is imported, and the shell

def test_label_files_become_an_annotation_file(salads, tmp_path):
    done = import_labels(salads, tmp_path / "one", fps=10, fold=1)
    shutil.copytree(salads / "features", tmp_path / "one" / "features")
    assert "subsets: test 2, train 2" in done.notes and "left out as background: background (16 runs)" in done.notes
    steps = dict(stride=1, snippet=1, channels_first=True)
    expected = load_dataset(salads, fps=10, fold=1)
    assert load_dataset(tmp_path / "one", **steps, classes=expected.classes).hash() == expected.hash()
    with pytest.raises(DataError, match="has the splits 1, 2; choose one"):
        import_labels(salads, tmp_path / "two", fps=10)
    with pytest.raises(DataError, match="states subsets; leave test_share out"):
        import_labels(salads, tmp_path / "two", fps=10, fold=1, test_share=0.5)
    with pytest.raises(DataError, match="is read as it is"):
        import_labels(salads / "groundTruth", salads, fps=10)
    (salads / "groundTruth" / "a.txt").write_text("cut\nglue\n")
    with pytest.raises(DataError, match="a.txt, line 2: label 'glue' is not in mapping.txt"):
        import_labels(salads, tmp_path / "two", fps=10, fold=1)
    assert not (tmp_path / "two").exists()


def test_the_import_finds_a_name_of_another_unicode_form(salads, tmp_path):
    (salads / "groundTruth" / "a.txt").rename(salads / "groundTruth" / f"{DECOMPOSED}.txt")
    bundle(salads, "1", [COMPOSED, "b"], [COMPOSED, *"bcd"])
    done = import_labels(salads, tmp_path / "one", fps=10, fold=1)
    assert {video.name for video in read_annotations(done.path).videos} == {COMPOSED, *"bcd"}


def test_the_mapping_next_to_the_folder_of_labels_is_read(salads, tmp_path):
    (salads / "mapping.txt").write_text("0 stir\n1 background\n")
    with pytest.raises(DataError, match="a.txt, line 21: label 'cut' is not in mapping.txt"):
        import_labels(salads / "groundTruth", tmp_path / "one", fps=10)


def test_no_stride_is_offered_that_would_not_fit_either(salads):
    path = salads / "groundTruth" / "a.txt"
    path.write_text(path.read_text() + 9 * "stir\n")
    with pytest.raises(DataError, match="has 309 labels.* has 300; copy both again"):
        load_fold(salads, 1, fps=10)


def test_detections_are_judged_by_the_test_split_of_a_folder(salads, tmp_path, capsys):
    (salads / "dataset.json").write_text('{"fps": 10}')
    truth = load_fold(salads, 1).ground_truth("test")
    results = {video: [{"label": g.label, "segment": [g.start, g.end], "score": 0.9} for g in own.itertuples()]
               for video, own in truth.groupby("video")}
    (tmp_path / "found.json").write_text(json.dumps({"results": results}))
    given = ["evaluate", str(salads), str(tmp_path / "found.json"), "--json", str(tmp_path / "judged.json")]
    assert main([*given, "--fold", "1"]) == 0
    assert json.loads((tmp_path / "judged.json").read_text())["average"] == 1
    capsys.readouterr()
    for options, message in (
        (["--fold", "1", "--subset", "test"], "the test split counts"), ([], "name one with --fold: 1, 2")
    ):
        assert main([*given, *options]) == 2
        assert message in capsys.readouterr().err


def test_the_import_of_one_folder_takes_its_mapping_for_no_recording(salads, tmp_path):
    flat = shutil.copytree(salads / "groundTruth", tmp_path / "flat")
    expected = import_labels(flat, tmp_path / "one", fps=10)
    shutil.copy(salads / "mapping.txt", flat)
    assert import_labels(flat, tmp_path / "two", fps=10)[1:] == expected[1:]


def test_the_import_in_a_shell(salads, tmp_path, capsys):
    labels = str(salads / "groundTruth")
    command = ["data", "import", labels, str(tmp_path / "new")]
    assert main([*command, "--fps", "10", "--background", "stir", "background", "--test-share", "0.4"]) == 0
    said = capsys.readouterr().out
    assert "5 videos, 15 instances" in said and "training 3, test 2 (drawn" in said and "stir (14 runs)" in said
    assert main([*command, "--force"]) == 2 and "give it: fps=... (--fps ...)" in capsys.readouterr().err
    assert main([*command, "--fps", "10", "--force", "--column", "label=verb", "--ignore", "x"]) == 2
    assert "is a folder of label files; leave --column, --ignore out" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("video,start,end,label\na,1,2,x\nb,1,2,x\n")
    assert main(["data", "import", str(tmp_path / "t.csv"), str(tmp_path / "x"), "--background", "x"]) == 2
    assert "is a table; leave --background out" in capsys.readouterr().err


def test_the_check_in_a_shell_takes_every_split_or_one(salads, tmp_path, capsys):
    out, command = tmp_path / "out.json", ["data", "check", str(salads), "--fps", "10", "--window", "64"]
    assert main([*command, "--json", str(out)]) == 0
    said, parts = capsys.readouterr().out, json.loads(out.read_text())
    assert list(parts) == ["1", "2"] and "fold 1\nsalads: can be trained on" in said and "\nfold 2\n" in said
    assert parts["2"] == check_folder(salads, fps=10, window=64, fold=2).to_dict()
    assert main([*command, "--fold", "2", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == parts["2"] and "fold" not in capsys.readouterr().out
    assert main([*command, "--fold", "3"]) == 2 and "has no fold '3'; it is one of 1, 2" in capsys.readouterr().err
    (salads / "splits" / "train.split2.bundle").write_text("")
    assert main(command) == 2 and "error: fold 2: salads: cannot be trained on" in capsys.readouterr().err
    assert {salads / "mapping.txt", salads / "splits"} < set(files_of(salads)) and "SIL" in BACKGROUND


def test_a_background_label_that_is_not_in_the_mapping_is_refused(salads):
    (salads / "dataset.json").write_text('{"fps": 10, "ignore_labels": ["backgruond"]}')
    with pytest.raises(DataError, match="mapping.txt: has no label 'backgruond', which ignore_labels .*background"):
        load_dataset(salads, release="framewise", fold=1)
    (salads / "dataset.json").write_text('{"fps": 10, "ignore_labels": ["stir"]}')
    assert "background" in load_dataset(salads, release="framewise", fold=1).classes


def test_imported_labels_must_be_as_long_as_the_features(salads, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(salads / "features", folder / "features")
    settings = {"fps": 10, "stride": 1, "snippet": 1, "channels_first": True}
    (folder / "dataset.json").write_text(json.dumps(settings))
    assert import_labels(salads, folder, fps=10, fold=1).videos == 4
    np.save(folder / "features" / "a.npy", np.zeros((6, 240), np.float32))
    with pytest.raises(DataError, match="a.txt: has 300 labels, so 300 steps at stride 1, but .*a.npy has 240"):
        import_labels(salads, folder, fps=10, fold=1, force=True)


def test_no_other_frame_rate_is_advised_where_labels_state_it(salads, capsys):
    settings = {"fps": 10, "stride": 1, "snippet": 1}
    (salads / "dataset.json").write_text(json.dumps(settings))
    for name, length in LENGTHS.items():
        np.save(salads / "features" / f"{name}.npy", np.ones((6, length // 5), np.float32))
    main(["data", "check", str(salads), "--fold", "1"])
    said = capsys.readouterr().out
    assert "stride 5 instead of 1" in said and "fps 2 instead" not in said
