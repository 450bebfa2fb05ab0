"""Finding data, and files that are not what they should be."""

import pytest

from selfdetr.data.files import DataError, find_data, parse_json, read_json


def test_find_data(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "checkout" / "nbs").mkdir(parents=True)
    monkeypatch.delenv("SELFDETR_DATA", raising=False)
    monkeypatch.chdir(tmp_path / "checkout" / "nbs")
    assert find_data("x") == tmp_path / "shared" / "data" / "x"
    assert find_data("y") is None and find_data("x", tmp_path) is None
    monkeypatch.setenv("SELFDETR_DATA", str(tmp_path / "other"))
    assert find_data("x") == tmp_path / "other" / "x"


def test_a_section_that_is_listed_twice_is_no_video():
    with pytest.raises(DataError, match="x.json: 'database' is listed twice"):
        parse_json('{"database": {}, "database": {}}', "x.json")


def test_a_list_for_an_object_says_what_to_write(tmp_path):
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset.json: holds a list, not an object; write \{...\}"):
        read_json(tmp_path / "dataset.json")
