"""The sources of the site: everything is on it, links hold, and what only nbdev needs is gone. Sphinx is not needed."""

import importlib.util
import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gather, check_site, check_words = script("gather"), script("check_site"), script("check_words")
INDEX = ROOT / "nbs" / "index.ipynb"


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    gather.gather(folder)
    return folder


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def globs():
    """What the tables of contents of index.md list."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]


def test_the_settings_of_sphinx_are_python():
    compile((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"), "conf.py", "exec")


def test_every_page_is_in_the_menu_and_every_entry_leads_to_one(site):
    files = [path for path in site.rglob("*") if path.suffix in (".md", ".ipynb")]
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in files}
    listed = {entry: {page for page in pages if fnmatchcase(page, entry)} for entry in globs()}
    assert not [entry for entry, found in listed.items() if not found], "entries of docs/index.md without a page"
    of_folders = {page for page in pages if page.startswith("results/") and page.count("/") == 2}  # listed by its index
    assert pages - set().union(*listed.values()) - of_folders == {"index", "README"}
    notebooks = {path.stem for path in (ROOT / "nbs").glob("*.ipynb")} - {"index"}
    assert {f"nbs/{notebook}" for notebook in notebooks} <= pages
    package = ROOT / "selfdetr"
    modules = {".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("[!_]*.py")}
    assert {f"api/{module}" for module in modules} <= pages


@pytest.mark.parametrize("path", [*gather.documents(), INDEX], ids=name)
def test_relative_links_lead_to_files(path):
    dead = [link for link in gather.local_links(path) if not (path.parent / link).resolve().is_file()]
    assert not dead, "links in Markdown to what does not exist"


def test_links_are_found_in_prose_and_not_in_code(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "[a](a.md#part) ![b](b/c.png) [`d`](d.ipynb \"title\") `[no](no.md)` [out](https://example.org) [here](#part)\n"
        "<img src=\"e.png\">\n\n```\n[no](no2.md)\n```\n"
    )
    assert gather.local_links(page) == ["a.md", "b/c.png", "d.ipynb", "e.png"]


def test_notebooks_are_shown_without_what_only_nbdev_needs(site):
    for path in site.rglob("*.ipynb"):
        shown = cells(path)
        assert {cell["cell_type"] for cell in shown} <= {"markdown", "code"}
        assert not [cell for cell in shown if re.search(r"^\s*#\s*\|", gather.source(cell), re.M)]
        assert shown[0]["cell_type"] == "markdown" and gather.source(shown[0]).startswith("# ")


def test_cells_are_hidden_marked_and_stripped_as_their_directives_say(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "ROOT", tmp_path)
    bar = {"output_type": "stream", "name": "stderr", "text": ["\r", " 50%|##   | 1/2"]}
    error = {"output_type": "stream", "name": "stderr", "text": ["tool: error: no such file\n"]}

    def code(text, *outputs):
        return {"cell_type": "code", "metadata": {}, "source": text.splitlines(True), "outputs": list(outputs)}

    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"metadata": {}, "cells": [
        {"cell_type": "raw", "metadata": {}, "source": ["---\n", "skip_exec: true\n", "---"]},
        {"cell_type": "markdown", "metadata": {}, "source": ["# Title"]},
        code("#| default_exp thing"),
        code("#| hide\nsecret = 1"),
        code("#|export\n#| eval: false\ndef f():\n    return '#| kept'", bar, error),
        code("# | hide_input\nf()"),
    ]}))
    _, exported, last = gather.notebook(path)["cells"]
    assert exported["source"] == "def f():\n    return '#| kept'" and exported["outputs"] == [error]
    assert exported["metadata"]["tags"] == ["exported"]
    assert last["source"] == "f()" and last["metadata"]["tags"] == ["remove-input"]


def test_links_to_a_table_lead_to_its_notebook():
    """The site has one page for both; with two of one name it is not built."""
    for path in gather.documents():
        for link in filter(lambda link: link.endswith(".md"), gather.local_links(path)):
            assert not (path.parent / link).with_suffix(".ipynb").exists(), (path, link)


def test_the_picture_of_the_package_has_every_module():
    architecture = script("architecture")
    drawn = " ".join(names for names, _, _ in architecture.ROOMS.values()).split()
    assert sorted(drawn) == sorted(architecture.modules())


def test_a_dead_link_ends_the_gathering(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("")
    (tmp_path / "README.md").write_text("[gone](nbs/99_gone.ipynb)")
    monkeypatch.setattr(gather, "ROOT", tmp_path)
    monkeypatch.setattr(gather, "PAGES", ("README.md",))
    with pytest.raises(SystemExit, match="README.md: links to nbs/99_gone.ipynb, which is no file of the repository"):
        gather.gather(tmp_path / "out")


def test_the_check_of_the_site_finds_what_is_broken(tmp_path):
    assert check_site.broken(tmp_path)
    (tmp_path / "a.html").write_text(
        '<h2 id="here">A</h2><a href="b.html#there">b</a><a href="#here">up</a><a href="https://example.org">out</a>'
        '<img src="data:image/png;base64,AA"><script src="s.js?v=1"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there"><a href="a.html">a</a></p>')
    (tmp_path / "s.js").write_text("")
    assert check_site.broken(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<a href="c.html">c</a><a href="a.html#gone">a</a><img src="d.png"><script src="https://example.org/x.js"></script>'
    )
    found = check_site.broken(tmp_path)
    assert len(found) == 5
    for part in ("c.html", "#gone", "d.png", "x.js", "#there"):  # the last is a.html's, to a place that is gone
        assert any(part in line for line in found)


def test_environments_agree_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, least = project["optional-dependencies"], project["requires-python"].removeprefix(">=")
    conda = (ROOT / "environment.yml").read_text()
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    pythons = [*re.findall(r"- python=(\S+)", conda), container["image"].split(":")[1].split("-")[0]]
    assert len(pythons) == 2
    assert all(tuple(map(int, one.split("."))) >= tuple(map(int, least.split("."))) for one in pythons)
    assert re.search(r"-e '?\.\[(\w+)\]", conda)[1] in extras
    assert container["postCreateCommand"] == "make .venv/.ok"  # which CI runs as well


def test_words_that_we_do_not_use_are_found_in_prose_alone(tmp_path):
    (tmp_path / "page.md").write_text("We mend it.\n\n```\nmend(beside=1)\n```\n`nobody` A hencefortune.")
    cells = [{"cell_type": kind, "id": kind, "source": ["Whatever\n", "you say"]} for kind in ("markdown", "code")]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    lines = check_words.found([tmp_path / "page.md", tmp_path / "n.ipynb"])
    assert [line.split("'")[1] for line in lines] == ["mend", "Whatever"]
    assert lines[1].startswith("n.ipynb, cell markdown")
    assert len(check_words.pages()) > 80


def test_a_page_that_is_html_already_is_on_the_site(site):
    page, original = (folder / "results" / "simulated-quick" / "explore.html" for folder in (site, ROOT))
    links = [re.findall(r'href="([^"]+)"', path.read_text(encoding="utf-8")) for path in (page, original)]
    assert links == [["../../nbs/59_explore.html"], ["../../nbs/59_explore.ipynb"]]
    assert "copy_whole_pages" in (ROOT / "docs" / "conf.py").read_text(), "Sphinx itself leaves them out"
