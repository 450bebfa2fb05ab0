"""Finding data, and files that are not what they should be."""


from selfdetr.data.files import find_data


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
