"""Segments from tables: what is read, what is refused, and what is written."""

import gzip
import json
import math

import numpy as np
import pytest
from checking import SMALL
from hypothesis import given
from hypothesis import strategies as st
from sports import annotation, database, save

from selfdetr.check.folder import check_folder
from selfdetr.check.tables import VIDEOS, _draw_subsets, import_segments
from selfdetr.data import DataError, load_dataset

ROWS = [("a", 1, 3, "run"), ("a", 5, 8.5, "jump"), ("b", 0, 2, "run"), ("c", 2, 4, "jump")]


def segments(path, header="video,start,end,label", rows=ROWS, delimiter=",", end="\n"):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text(end.join(lines) + end)
    return path


def stored(folder):
    return json.loads((folder / "annotations.json").read_text())["database"]


@pytest.mark.parametrize("header, delimiter, end", [
    ("video,start,end,label", ",", "\n"),
    ("Video_ID;T_Start;T_End;Class", ";", "\r\n"),
    ("filename\tbegin\tend\taction", "\t", "\n"),
    ("\ufeffvideo,Start (s),End (s),Label", ",", "\n")])
def test_the_usual_tables_are_read(tmp_path, header, delimiter, end):
    table = segments(tmp_path / "table", header, delimiter=delimiter, end=end)
    done = import_segments(table, tmp_path / "x", test_share=0.34)
    entries = stored(tmp_path / "x")
    assert done.instances == 4 and done.videos == 3 and list(entries) == ["a", "b", "c"]
    assert [item["segment"] for item in entries["a"]["annotations"]] == [[1, 3], [5, 8.5]]
    assert sorted(entry["subset"] for entry in entries.values()) == ["test", "training", "training"]
    assert entries["a"]["duration"] == 8.5 and "warning" in str(done)


def test_columns_of_subsets_and_durations_and_recordings_without_actions(tmp_path):
    rows = [("a", 1, 3, "run", "train", 30), ("a", 5, 8, "jump", "train", ""), ("b", "", "", "", "val", 12)]
    table = segments(tmp_path / "t.csv", "video,start,end,label,split,duration", rows)
    done = import_segments(table, tmp_path / "x")
    assert stored(tmp_path / "x")["b"] == {"subset": "val", "duration": 12, "annotations": []}
    assert "warning" not in str(done) and "train 1, val 1" in str(done)
    with pytest.raises(DataError, match="leave test_share out"):
        import_segments(table, tmp_path / "y", test_share=0.5)


def test_durations_from_features_make_a_folder_that_loads(folder):
    entries = database().items()
    rows = [(name, *item["segment"], item["label"]) for name, entry in entries for item in entry["annotations"]]
    (folder / "dataset.json").write_text(json.dumps({"fps": 10, "stride": 1, "snippet": 1}))
    done = import_segments(segments(folder / "t.csv", rows=rows), folder, force=True, test_share=0.5)
    assert "durations from the features: 4 videos" in done.notes
    assert {name: entry["duration"] for name, entry in stored(folder).items()} == {"a": 30, "b": 20, "c": 5, "d": 25}
    assert check_folder(folder, **SMALL).ok and len(load_dataset(folder).ground_truth(None)) == 8


NAMES = "video,start,end,label"


@pytest.mark.parametrize("header, rows, words", [
    ("clip,start,end,label", ROWS, ["no column for the video", "found: clip, start, end, label", "columns="]),
    ("video,start,begin,end,label", [("a", 1, 2, 3, "x")], ["'start' and 'begin'", "--column start="]),
    (NAMES, [("a", 1, 3, "x"), ("a", 3, 1, "x"), ("a", -1, 1, "x")], ["line 3: ends at 1 s", "line 4"]),
    (NAMES, [("a", -1, 1, "x")], ["line 2", "start: time '-1'", "from 0"]),
    (NAMES, [("a", "1,5", 3, "x")], ["line 2", "5 cells instead of 4", "quote"]),
    (NAMES, [("a", "one", 3, "x")], ["line 2", "start: time 'one'", "h:m:s"]),
    (NAMES, [("a", "nan", 3, "x")], ["line 2", "start: time 'nan'", "write a number"]),
    (NAMES, [("a", 1, "00:00:03:12", "x")], ["line 2", "end: time '00:00:03:12' ends in frames", "--fps"]),
    (NAMES, [("a", "0:61", "1:20", "x")], ["line 2", "'0:61' has minutes or seconds of 60 or more"]),
    (NAMES, [("a", "1_0", 30, "x")], ["line 2", "start: time '1_0'"]),
    (NAMES, [("a", 1, 3, "")], ["line 2", "no label"]),
    (NAMES, [("", 1, 3, "x")], ["line 2", "no name"]),
    (f"{NAMES},subset", [("a", 1, 3, "x", "train"), ("a", 4, 5, "x", "test")],
     ["line 3", "'a'", "'test'", "'train'", "write the same"]),
    (f"{NAMES},subset", [("a", 1, 3, "x", "")], ["line 2", "subset is ''"]),
    (f"{NAMES},duration", [("a", 1, 3, "x", 9), ("a", 4, 5, "x", 8), ("b", 1, 2, "x", 9)],
     ["line 3", "duration 8", "write the same", "--ignore"]),
    (f"{NAMES},duration", [("a", 0, 0.5, "x", 0), ("b", 4, 5, "x", 8)], ["line 2", "duration is 0"]),
    ("video,start_frame,end_frame,label", ROWS, ["frames", "fps="]),
    ("video,start (ms),end (ms),label", ROWS, ["'start (ms)' holds milliseconds", "write seconds"]),
    ("video,Start Time (msec),end,label", ROWS, ["'Start Time (msec)' holds milliseconds", "write seconds"]),
    ("video,start (min),end (min),label", ROWS, ["'start (min)' holds minutes", "write seconds"]),
    ("video,start,end (Minutes),label", ROWS, ["'end (Minutes)' holds minutes", "write seconds"]),
    ("video,start,end,label,duration (min)", [(*row, 1) for row in ROWS], ["'duration (min)' holds minutes"]),
    ("video,start_sec,end_frame,label", ROWS, ["'start_sec' holds seconds and 'end_frame' holds frames"]),
    ("video,start,end_frame,label", ROWS, ["'end_frame' holds frames", "fps="]),
    (NAMES, [], ["no rows"]),
    (NAMES, [("a", "", "", "")] + ROWS[2:], ["line 2", "no segment, no duration and no features"]),
    (NAMES, ROWS[:2], ["1 videos cannot be split"])])
def test_bad_tables_are_refused_with_line_and_fix_and_nothing_is_written(tmp_path, header, rows, words):
    table = segments(tmp_path / "t.csv", header, rows)
    with pytest.raises(DataError) as caught:
        import_segments(table, tmp_path / "x")
    message = str(caught.value)
    assert [word for word in ["t.csv", *words] if word not in message] == [], message
    assert "\n" not in message and not (tmp_path / "x").exists()


@pytest.mark.parametrize("header", ["start_sec,end_sec", "Start Time (s),End Time (s)", "start (seconds),end"])
def test_times_in_seconds_are_not_divided_by_a_rate(tmp_path, header):
    table = segments(tmp_path / "t.csv", f"video,{header},label")
    with pytest.raises(DataError, match="holds seconds; leave fps out"):
        import_segments(table, tmp_path / "x", fps=25)
    import_segments(table, tmp_path / "x")
    assert stored(tmp_path / "x")["a"]["annotations"][0]["segment"] == [1, 3]


def test_a_unit_holds_for_a_column_that_is_named(tmp_path):
    table = segments(tmp_path / "t.csv", "video,start_ms,end_ms,label")
    with pytest.raises(DataError, match="'start_ms' holds milliseconds"):
        import_segments(table, tmp_path / "x", columns={"start": "start_ms", "end": "end_ms"})


@pytest.mark.parametrize("header", [
    "start_time,end_time", "t_start,t_end", "start_timestamp,end_timestamp", "start (h:m:s),end (min:sec)"])
def test_headers_without_a_unit_are_frames_where_a_rate_is_given(tmp_path, header):
    import_segments(segments(tmp_path / "t.csv", f"video,{header},label"), tmp_path / "x", fps=2)
    assert stored(tmp_path / "x")["a"]["annotations"][0]["segment"] == [0.5, 1.5]


def test_a_segment_of_no_length_is_a_note(tmp_path):
    done = import_segments(segments(tmp_path / "t.csv", rows=[*ROWS[:3], ("c", 2, 2, "jump")]), tmp_path / "x")
    assert "1 segments of no length, which loading drops (line 5)" in done.notes
    assert "no length" not in str(import_segments(segments(tmp_path / "u.csv"), tmp_path / "y"))


def rows_with(durations, spans=((40, 55), (12, 20), (0, 7), (3, 3.5))):
    return [(name, *span, "x", length) for name, span, length in zip("abcdefghijklmnopqrst", spans, durations)]


@pytest.mark.parametrize("rows, fps", [
    (rows_with((15, 8)), None),
    (rows_with((15, 8, 7, 0.5)), None),
    (rows_with((15.02, 7.98, 7, 0.5)), None),
    (rows_with(("0:15", "0:08")), None),
    (rows_with((15, 8), [(40.2, 55.1), (12.4, 20.3)]), None),  # rounded to seconds
    (rows_with((15,) * 19 + (999,), [(10 + i, 25 + i) for i in range(20)]), None),  # nearly all
    (rows_with((15,) * 8 + (999,) * 2, [(10 + i, 25 + i) for i in range(10)]), None),  # most
    (rows_with((45, 30), [(30, 75), (900, 930)]), 30),  # frames
    (rows_with((46, 31), [(30, 75), (900, 930)]), 30),  # the last frame counted
    ([("a", 1, 3, "x", 2), ("a", 8, 9, "y", 1), ("b", 2, 3, "x", 1)], None)])
def test_a_duration_that_is_the_segments_own_is_not_used(tmp_path, rows, fps):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x", fps=fps)
    entry = stored(tmp_path / "x")["a"]
    assert entry["duration"] == entry["annotations"][-1]["segment"][1]
    (note,) = [note for note in done.notes if "column 'duration'" in note]
    assert "not used" in note and "durations from the last segment" in str(done)


def test_a_duration_that_no_recording_can_have_is_not_used(tmp_path):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},Duration", rows_with((0.5, 0.25))), tmp_path / "x")
    (note,) = [note for note in done.notes if "column 'Duration'" in note]
    assert "2 of 2 segments end after it" in note and stored(tmp_path / "x")["b"]["duration"] == 20


@pytest.mark.parametrize("rows", [
    rows_with((60, 30)),
    rows_with((60, 30), [(40, 60.4), (12, 30)]),  # the end is later by less than a second: cut in loading
    rows_with((7, 5), [(0, 7), (0, 5)]),  # both readings give this
    [("a", 3, 5, "x", 60), ("a", 8, 10, "x", 60), ("b", 2, 4, "x", 60)]])
def test_durations_of_the_recordings_are_used(tmp_path, rows):
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x")
    assert [entry["duration"] for entry in stored(tmp_path / "x").values()] == [rows[0][-1], rows[-1][-1]]
    assert "durations from the table: 2 videos" in done.notes and "column" not in str(done)


def test_a_duration_that_contradicts_some_ends_is_a_warning_that_names_them(tmp_path):
    spans = [(40, 55), (12, 20), (0, 8), (2, 70)]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration", rows_with((60, 30, 10, 9), spans))
    done = import_segments(table, tmp_path / "x")
    (warning,) = [note for note in done.notes if "end after" in note]
    assert "1 segments end after the duration of their recording (line 5)" in warning
    assert "--ignore 'duration'" in warning
    assert stored(tmp_path / "x")["d"]["duration"] == 9
    import_segments(table, tmp_path / "y", ignore=["duration"])
    assert stored(tmp_path / "y")["d"]["duration"] == 70
    own = segments(tmp_path / "own.csv", f"{NAMES},duration", rows_with((15, 8)))
    named = import_segments(own, tmp_path / "z", columns={"duration": "duration"})  # it is what it is said to be
    assert any("2 segments end after" in note for note in named.notes) and stored(tmp_path / "z")["a"]["duration"] == 15


def test_a_duration_in_seconds_beside_frames_is_said_to_be_that(tmp_path):
    rows = [("a", 30, 75, "x", 10), ("b", 0, 15, "x", 12)]
    done = import_segments(segments(tmp_path / "t.csv", f"{NAMES},duration", rows), tmp_path / "x", fps=30)
    assert stored(tmp_path / "x")["a"]["duration"] == 10
    assert [note for note in done.notes if "'duration' is read as seconds" in note]


def test_columns_are_ignored_when_asked(tmp_path):
    rows = [("a", 1, 3, "x", "junk", 5), ("b", 2, 3, "x", "", 6)]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration,onset", rows)
    with pytest.raises(DataError, match="'start' and 'onset' may both be the start"):
        import_segments(table, tmp_path / "x")
    with pytest.raises(DataError, match=r"no column 'onsett'.*found: video, start, end, label, duration, onset"):
        import_segments(table, tmp_path / "x", ignore=["duration", "onsett"])
    with pytest.raises(DataError, match="columns names 'lable'.*video, start, end, label"):
        import_segments(table, tmp_path / "x", columns={"lable": "label"}, ignore=["onset"])
    import_segments(table, tmp_path / "x", ignore=["duration", "onset"])
    assert stored(tmp_path / "x")["a"]["duration"] == 3


@pytest.mark.parametrize("first, second, name", [
    ("P01/cam1/cereals.avi", "P02/cam1/cereals.avi", "P02_cam1_cereals"),
    ("P01\\cereals.avi", "P02\\cereals.avi", "P02_cereals"),
    ("cereals.avi", "/data/P02/cereals.avi", "data_P02_cereals"),
    ("cereals.avi", "D:\\v\\cereals.avi", "'v_cereals'"),
    ("P01/cereals.avi", "cereals.avi", "else own names and features"),
    ("C:/cereals.avi", "D:/cereals.avi", "else own names and features")])
def test_two_recordings_of_one_name_are_refused(tmp_path, first, second, name):
    table = segments(tmp_path / "t.csv", rows=[(first, 1, 2, "x"), ("other", 1, 2, "x"), (second, 5, 6, "y")])
    with pytest.raises(DataError) as caught:
        import_segments(table, tmp_path / "x")
    message = str(caught.value)
    wanted = ["t.csv, line 4", repr(first), "line 2", repr(second), "would both be 'cereals'", name]
    assert [word for word in wanted if word not in message] == [], message


@pytest.mark.parametrize("first, second", [
    ("./P01/a.avi", "P01/a.avi"), ("P01\\a.avi", "P01//a.avi"), ("x/../P01/a.avi", "P01/a.AVI"), ("a", "./a.mp4"),
    ("a.mp4", "a.wav"), ("\u00fcbung.mp4", "u\u0308bung.mp4")])
def test_a_path_written_in_two_ways_is_one_recording(tmp_path, first, second):
    table = segments(tmp_path / "t.csv", rows=[(first, 1, 2, "x"), ("other", 1, 2, "x"), (second, 5, 6, "y")])
    done = import_segments(table, tmp_path / "x")
    entries = stored(tmp_path / "x")
    assert done.videos == 2 and [len(entry["annotations"]) for entry in entries.values()] == [2, 1]
    assert first.endswith(("a.mp4", "a")) == any("taken for one recording" in note for note in done.notes)


def test_the_endings_of_videos_are_those_that_features_are_made_of(tmp_path):
    rows = [(f"film{i}{ending.upper()}", 1, 2, "x") for i, ending in enumerate(VIDEOS)]
    import_segments(segments(tmp_path / "t.csv", rows=rows), tmp_path / "x")
    assert list(stored(tmp_path / "x")) == [f"film{i}" for i in range(len(VIDEOS))] and ".wmv" in VIDEOS


@pytest.mark.parametrize("first, delimiter", [("sep=;", ";"), ('"sep=,"', ","), ("SEP=\t", "\t"), ("sep=|", "|")])
def test_the_first_line_may_name_the_delimiter(tmp_path, first, delimiter):
    table = segments(tmp_path / "t.csv", f"{first}\r\n{NAMES.replace(',', delimiter)}", delimiter=delimiter, end="\r\n")
    assert import_segments(table, tmp_path / "x").instances == 4
    bad = segments(tmp_path / "b.csv", f"{first}\n{NAMES.replace(',', delimiter)}", [("a", 3, 1, "x")], delimiter)
    with pytest.raises(DataError, match="line 3: ends at 1 s"):
        import_segments(bad, tmp_path / "y")


CSV = "video,start,end,label\na,1,2,x\nb,1,2,x\n"


@pytest.mark.parametrize("name, content, words", [
    ("t.xlsx", b"PK\x03\x04" + bytes(range(256)), "is an Excel workbook; save it as CSV (UTF-8)"),
    ("t.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "is an Excel workbook; save it as CSV (UTF-8)"),
    ("t.ods", b"PK\x03\x04" + bytes(100), "is a zip file, as workbooks are; save it as CSV (UTF-8)"),
    ("t.csv", CSV.encode("utf-16"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.encode("utf-16-be"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.replace("x", "\u8dd1").encode("utf-16-le"), "is UTF-16 text; save it as CSV (UTF-8)"),
    ("t.csv", CSV.replace("x", "x\0").encode(), "is no table of text; save it as CSV (UTF-8)"),
    ("t.npy", b"\x93NUMPY\1\0v\0" + bytes(range(90)) * 2, "is no table of text; save it as CSV (UTF-8)"),
    ("t.csv.gz", gzip.compress(CSV.encode(), mtime=0), "is a gzip file; unpack it"),
    ("t.csv", CSV.replace(",", ";").replace("1", "1,5").encode(), "start: time '1,5'; write a number"),
    ("t.csv", CSV.replace(",", ";").replace("1", "1,5").encode(), "a point instead of the comma"),
    ("t.csv", CSV.replace("a,1", "a,1,5").encode(), "5 cells instead of 4; quote what contains a delimiter, and")])
def test_a_file_as_spreadsheets_write_it_is_told_the_way_out(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        import_segments(tmp_path / name, tmp_path / "x")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and words in message and "\n" not in message, message


@pytest.mark.parametrize("rate", [0, -25, math.nan, math.inf, True, 1e9])
def test_a_rate_is_positive(tmp_path, rate):
    with pytest.raises(DataError, match="frames a second above 0"):
        import_segments(segments(tmp_path / "t.csv"), tmp_path / "x", fps=rate)
    assert not (tmp_path / "x").exists()


def test_clock_times_are_not_frames(tmp_path):
    rows = [("a", "0:01:02", "00:01:03:15", "x", "2:00"), ("b", 1500, 3000, "x", "2:00")]
    table = segments(tmp_path / "t.csv", f"{NAMES},duration", rows)
    import_segments(table, tmp_path / "x", fps=25, ignore=[])
    spans = [entry["annotations"][0]["segment"] for entry in stored(tmp_path / "x").values()]
    assert spans == [[62, 63.6], [60, 120]] and stored(tmp_path / "x")["a"]["duration"] == 120
    import_segments(table, tmp_path / "y", fps=30000 / 1001)
    assert stored(tmp_path / "y")["b"]["annotations"][0]["segment"] == [50.05, 100.1]


def test_unreadable_tables(tmp_path):
    (tmp_path / "t.csv").write_bytes("video,start,end,label\nä,1,2,x\n".encode("latin-1"))
    for path, words in ((tmp_path / "t.csv", "UTF-8"), (tmp_path / "none.csv", "check the path")):
        with pytest.raises(DataError, match=words):
            import_segments(path, tmp_path / "x")


def test_frames_and_named_columns(tmp_path):
    rows = [("a", 30, 75, "cut"), ("b", 0, 15, "cut")]
    table = segments(tmp_path / "t.csv", "clip,start_frame,stop_frame,verb", rows)
    import_segments(table, tmp_path / "x", fps=30, columns={"video": "clip", "label": "verb"})
    entry = stored(tmp_path / "x")["a"]
    assert entry["annotations"] == [annotation("cut", 1.0, 2.5)] and entry["fps"] == 30


def test_features_are_opened_only_for_a_duration_that_the_table_does_not_say(folder):
    save(np.array([{}], dtype=object), "a")(folder)
    rows = [("a", 1, 3, "run", 30), ("b", 1, 3, "run", 20)]
    import_segments(segments(folder / "t.csv", f"{NAMES},duration", rows), folder, force=True)
    assert [entry["duration"] for entry in stored(folder).values()] == [30, 20]
    (folder / "dataset.json").write_text(json.dumps({"fps": 10, "stride": 1, "snippet": 1}))
    with pytest.raises(DataError, match="pickled"):
        import_segments(segments(folder / "t.csv"), folder, force=True)


def test_an_annotation_file_is_replaced_only_when_asked(tmp_path):
    table, folder = segments(tmp_path / "t.csv"), tmp_path / "x"
    import_segments(table, folder)
    before = (folder / "annotations.json").read_bytes()
    with pytest.raises(DataError, match="--force"):
        import_segments(table, folder, seed=5)
    assert (folder / "annotations.json").read_bytes() == before
    (tmp_path / "y" / "annotations.json").mkdir(parents=True)
    with pytest.raises(DataError, match="annotations.json: is a folder"):
        import_segments(table, tmp_path / "y")
    import_segments(segments(table, rows=ROWS[:3]), folder, force=True)
    assert list(stored(folder)) == ["a", "b"] and [path.name for path in folder.iterdir()] == ["annotations.json"]


@given(
    names=st.sets(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8), min_size=2, max_size=40),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 9),
)
def test_drawn_subsets_depend_on_names_and_seed_only(names, share, seed):
    drawn = _draw_subsets(sorted(names), share, seed)
    assert drawn == _draw_subsets(sorted(names, reverse=True), share, seed) and set(drawn) == names
    tests = list(drawn.values()).count("test")
    assert 1 <= tests < len(names) and abs(tests - share * len(names)) <= 1
