"""Every fault of the files of features is a finding: names, values, channels, lengths."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import kinds, of, rename
from sports import COMPOSED, DECOMPOSED, edit, save, write
from test_data_dataset import SPOILED
from test_data_features import SEVERAL

from selfdetr.check.features import Measured, _check_lengths, _explain_names
from selfdetr.check.findings import Findings
from selfdetr.check.folder import check_folder
from selfdetr.data import TimeGrid, load_dataset
from selfdetr.data.features import FeatureFiles

RENAMED = [
    (lambda p: p.with_name(f"v_{p.name}"), ["v_a.npy", '"prefix": "v_"']),
    (lambda p: p.with_name(p.name.replace(".npy", "_rgb.npy")), ["a_rgb.npy", "'_rgb'", "files' names"]),
    (lambda p: p.with_suffix(".npz"), ["a.npz", '"feature_format": "npz"']),
    (lambda p: p.with_suffix(".pt"), ["a.pt", '"feature_format": "pt"']),
    (lambda p: p.with_suffix(".pkl"), ["a.pkl", "numpy.save"]),
    (lambda p: p.with_name(p.name.upper()), ["A.NPY", "case"]),
    (lambda p: p.with_name(f"v_{p.stem}.pt"), ["v_a.pt", '"prefix": "v_"', '"feature_format": "pt"']),
]


@pytest.mark.parametrize("change, words", RENAMED)
def test_names_that_differ_are_explained(folder, change, words):
    rename(folder, change)
    findings = check_folder(folder)
    missing = findings.table[findings.table.kind == "missing features"]
    assert len(missing) == 5 and set(missing.severity) == {"error"} and "extra features" not in kinds(findings)
    first = missing.iloc[0]
    said = f"{first.problem} {first.fix}"
    assert [word for word in ["a.npy is not there", *words] if word not in said] == [], said


@pytest.mark.parametrize("written, there", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_file_in_another_unicode_form_is_a_note(folder, written, there):
    edit(lambda d: d.update({written: d.pop("b")}))(folder)
    path = folder / "features" / "b.npy"
    path = path.rename(path.with_stem(there))
    findings = check_folder(folder)
    assert findings.ok and not {"missing features", "extra features"} & kinds(findings)
    finding = of(findings, "other form")
    assert finding.severity == "note" and ascii(written) in finding.problem and ascii(f"{there}.npy") in finding.problem
    path.rename(path.with_stem(f"v_{there}"))
    (missing,) = [finding for finding in check_folder(folder).found if finding.kind == "missing features"]
    assert f"v_{there}.npy is" in missing.problem and '"prefix": "v_"' in missing.fix


def test_one_file_for_two_videos_is_an_error(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b"), DECOMPOSED: d.pop("c")}))(folder)
    save(np.ones((200, 6), np.float32), COMPOSED)(folder)
    finding = of(check_folder(folder), "feature file")
    assert ascii(COMPOSED) in finding.problem and ascii(DECOMPOSED) in finding.problem and "one name" in finding.fix


def test_a_name_that_no_file_can_have_is_one_finding_of_several(folder):
    edit(lambda d: (d.update({"x" * 253: d.pop("a")}), d["b"].update(duration=-5)))(folder)
    findings = check_folder(folder)
    assert "is no name inside the folder" in of(findings, "feature file").problem
    assert not findings.ok and {"video entry", "extra features"} <= kinds(findings)


def test_a_file_for_the_folder_of_features(folder):
    finding = of(check_folder(folder, features="features/a.npy"), "feature folder")
    assert finding.problem == "is a file" and '"features": "features"' in finding.fix


def test_the_fix_for_a_prefix_works(folder):
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    findings = check_folder(folder, prefix="v_")
    assert findings.ok and "missing features" not in kinds(findings)
    assert load_dataset(folder, prefix="v_").hash() == load_dataset(write(folder.with_name("other"))).hash()


def test_files_under_another_name_are_looked_through(folder):
    SPOILED["NaN"][0](folder)
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    assert of(check_folder(folder), "feature values").item == "features/v_b.npy"


def test_a_name_with_a_folder_leads_to_its_file(folder):
    edit(lambda d: d.update({"part/b": d.pop("b")}))(folder)
    (folder / "features" / "part").mkdir()
    (folder / "features" / "b.npy").rename(folder / "features" / "part" / "b.npy")
    findings = check_folder(folder)
    assert findings.ok and "missing features" not in kinds(findings) and "part/b" in load_dataset(folder).by_name


def test_a_few_missing_and_extra_files(folder):
    (folder / "features" / "b.npy").rename(folder / "features" / "spare.npy")
    findings = check_folder(folder)
    assert findings.ok and of(findings, "missing features").severity == "warning"
    assert "tried other endings" in of(findings, "missing features").problem
    assert of(findings, "extra features").item == "features/spare.npy"


def test_short_names_do_not_match_everything():
    files = [Path(f"recording_{i}.npy") for i in range(40)]
    place = FeatureFiles(Path("x"))
    assert _explain_names(["1"], [*files, Path("other.npy")], place)["1"][0].name == "recording_1.npy"
    assert _explain_names([f"video_{i}" for i in range(40, 60)], files, place) == {}


def test_another_feature_folder_is_named(folder):
    (folder / "features").rename(folder / "i3d_features")
    finding = of(check_folder(folder), "feature folder")
    assert '"features": "i3d_features"' in finding.fix
    assert check_folder(folder, features="i3d_features").ok


def test_features_are_checked_without_annotations(folder):
    (folder / "annotations.json").write_text("[]")
    save(np.full((9, 6), np.nan, np.float32), "b")(folder)
    assert {"annotation layout", "feature values"} <= kinds(check_folder(folder))


def test_transposed_files_are_one_error_with_one_fix(folder):
    for path in (folder / "features").iterdir():
        np.save(path, np.load(path).T)
    findings = check_folder(folder)
    assert {f.kind for f in findings.found if f.severity == "error"} == {"channels first"}
    assert '"channels_first": true' in of(findings, "channels first").fix
    assert check_folder(folder, channels_first=True).ok
    for path in (folder / "features").iterdir():
        np.save(path, np.load(path).T)
    assert '"channels_first": false' in of(check_folder(folder, channels_first=True), "channels first").fix


def lengths(durations, steps, *grid):
    "The findings on recordings of these durations, with so many steps each."
    found, path = Findings(Path("x")), Path("x.npy")
    rows = zip(durations, steps)
    _check_lengths({s: Measured(path, int(n), 8, s, TimeGrid(*grid)) for s, n in rows}, found, "features")
    return found


@pytest.mark.parametrize("fps, stride, snippet", [(29.97, 4, 16), (25, 8, 16), (10, 1, 1), (30, 16, 16)])
@pytest.mark.parametrize("how", ["whole snippets", "padded", "rounded"])
def test_usual_extractions_have_the_right_length(fps, stride, snippet, how):
    durations = [7.0 + 13.7 * i for i in range(12)]
    count = {"whole snippets": lambda n: (n - snippet) // stride + 1, "padded": lambda n: -(-n // stride),
             "rounded": lambda n: round(n / stride)}[how]
    assert not lengths(durations, [count(int(s * fps)) for s in durations], fps, stride, snippet).found


@pytest.mark.parametrize(
    "wrong, right",
    [((30, 4, 16), (30, 8, 16)), ((30, 16, 16), (30, 4, 16)), ((25, 4, 16), (30, 4, 16)), ((60, 5, 5), (30, 5, 5))],
)
def test_the_stride_or_rate_that_would_fit_is_named(wrong, right):
    durations = [40.0 + 33.3 * i for i in range(12)]
    finding = of(lengths(durations, [s * right[0] / right[1] for s in durations], *wrong), "time grid")
    expected = f"fps {right[0]} instead" if wrong[0] != right[0] else f"stride {right[1]} instead"
    assert expected in finding.fix and finding.severity == ("warning" if wrong[0] == 25 else "error")


RATES = [(12.5, 10, "10 fits better, so correct"), (10, 12.5, "10 fits better, so what is in use seems right")]


@pytest.mark.parametrize("in_use, stated, words", RATES)
def test_frame_rates_that_differ_are_one_warning(folder, in_use, stated, words):
    write(folder, fps=in_use)
    edit(lambda d: [entry.update(fps=stated) for entry in d.values()])(folder)
    finding = of(check_folder(folder), "frame rates")
    assert (finding.severity, finding.item) == ("warning", "dataset.json") and words in finding.fix
    assert finding.problem == f"fps is {in_use:g} in use, but {stated:g} as stated for 5 of 5 videos, such as 'a'"
    assert "frame rates" not in kinds(check_folder(folder, fps=stated)) | kinds(check_folder(folder, resize=32))


@pytest.mark.parametrize("kind, content, words, wanted", SEVERAL.values(), ids=SEVERAL)
def test_the_message_about_a_file_of_several_arrays_is_whole(folder, kind, content, words, wanted):
    for path in (folder / "features").iterdir():
        np.savez(path.with_suffix(".npz"), np.load(path))
        torch.save(torch.from_numpy(np.load(path)), path.with_suffix(".pt"))
    path = folder / "features" / f"b.{kind}"
    np.savez(path, **content) if kind == "npz" else torch.save(content, path)
    finding = of(check_folder(folder, feature_format=kind), "feature file")
    assert [word for word in words if word not in finding.problem] == [], finding.problem
    assert finding.fix.startswith("save one array of them, by np.save('b.npy', ") and finding.fix.endswith(")")


def test_memory_does_not_grow_with_the_recordings(folder):
    for name in "abc":
        save(np.zeros((30_000, 256), np.float16), name)(folder)  # 15 MB each, and 7.7 MB of True and False
    edit(lambda d: [d[name].update(duration=3000.0) for name in "abc"])(folder)
    tracemalloc.start()
    findings = check_folder(folder)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert findings.table.kind.tolist().count("all zero") == 3 and most < 5e6


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_other_formats_are_looked_through_as_well(folder, kind):
    for path in (folder / "features").iterdir():
        array = np.load(path)
        if path.stem == "b":
            array[7] = np.inf
        path.unlink()
        if kind == "npz":
            np.savez(path.with_suffix(".npz"), array)
        else:
            torch.save(torch.from_numpy(array), path.with_suffix(".pt"))
    findings = check_folder(folder, feature_format=kind)
    assert [finding.item for finding in findings.found if finding.severity == "error"] == [f"features/b.{kind}"]
