"""The repository keeps its own rules: notebooks for papermill, a reading order, no foreign paths, a light package."""

import ast
import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest

from selfdetr.study import source_hash

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STUDIES = [path for path in NOTEBOOKS if path.name.startswith("reproduce_")]
PARAMETERS = {"dataset": "str", "profile": "str", "data_root": "str", "seeds": "int", "device": "str", "workers": "int",
              "out_dir": "str", "cluster": "str"}
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])(?:/(?:home|Users|root|work|workspace|mnt|opt|tmp|private)/[\w.-]+|[A-Z]:\\+Users)"
)
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.|anaconda\.(?:org|com)|download\.pytorch\.|npmjs\.|crates\.io", re.I)


def name(path):
    return path.name


def project_files():
    """Every file that git tracks or would track."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in map(ROOT.joinpath, filter(None, listed.stdout.split("\0"))) if path.is_file()]


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tree(cell):
    """Syntax of a code cell, without IPython's own lines."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M))


def imports(syntax):
    """Modules a piece of code imports, with its relative imports as selfdetr's own."""
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "selfdetr." if node.level else ""
            own = f"{prefix}{node.module or ''}".rstrip(".")
            yield from [f"selfdetr.{alias.name}" for alias in node.names] if own == "selfdetr" else [own]


def text_of(path):
    """A file's text, None for a binary one; of a notebook everything but its pictures."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return re.sub(r'"image/(?:png|jpeg)":\s*(?:"[^"]*"|\[[^]]*\])', '""', text) if path.suffix == ".ipynb" else text


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_a_study_has_one_cell_of_typed_parameters(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "without exactly one cell tagged `parameters` papermill runs the defaults"
    found = {node.target.id: node.annotation.id for node in tree(tagged[0]).body if isinstance(node, ast.AnnAssign)}
    assert found == PARAMETERS
    assert any("skip_exec: true" in source(cell) for cell in cells(path, "raw")[:1]), "nbdev_test would train the study"


def made(*arguments):
    """What make would run."""
    if shutil.which("make") is None:
        pytest.skip("make is not here")
    own = {"PATH": os.environ["PATH"]}  # not what a `make test` has set
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=own).stdout


def test_what_is_run_by_default_is_what_is_in_results():
    """A fresh clone that reproduces replaces no table by one of fewer seeds; a first look has its own folder."""
    tables = [json.loads(path.read_text()) for path in ROOT.glob("results/*/table3.json")]
    [seeds] = {len(table["seeds"]) for table in tables if not table.get("folds")}
    for path in STUDIES:
        [tagged] = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        default = {node.target.id: ast.literal_eval(node.value) for node in tree(tagged).body}
        assert (default["seeds"], default["out_dir"]) == (seeds, "results"), path.name
    asked = re.compile(r'-p seeds "(\d+)".*?-r out_dir "([\w-]+)"', re.S)
    assert asked.findall(made("reproduce")) == [(str(seeds), "results")]
    assert set(asked.findall(made("study"))) == {(str(seeds), "results")}
    assert asked.findall(made("look")) == [("1", "results-look")]
    assert asked.findall(made("look", "SEEDS=2")) == [("2", "results-look")]
    try:
        ignored = subprocess.run(["git", "check-ignore", "-q", "results-look/simulated-quick/table3.md"], cwd=ROOT)
    except OSError:
        pytest.skip("git is not here")
    assert ignored.returncode in (0, 128)  # 128: not a git checkout


def test_cleaning_keeps_the_tags_and_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split()
    namespace: dict = {}
    exec((ROOT / "selfdetr" / "__init__.py").read_text(), namespace)
    assert settings["DEFAULT"]["version"] == namespace["__version__"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_shows_its_outputs_or_where_they_are(path):
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    prose = "\n".join(map(source, cells(path, "markdown")))
    assert outputs or "results/" in prose, "no stored outputs, and no word on which folder of results/ holds them"
    assert not [output for output in outputs if output["output_type"] == "error"], "a stored output is a traceback"


def test_sizes():
    files = project_files()
    large = [path.name for path in files if path.suffix == ".ipynb" and path.stat().st_size > 1.5e6]
    assert not large, "notebooks over 1.5 MB"
    assert sum(path.stat().st_size for path in files) < 30e6


def test_no_machine_paths_or_registry_hosts():
    found = []
    for path in project_files():
        for pattern in (MACHINE_PATH, REGISTRY):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text_of(path) or "")]
    assert not found


@pytest.mark.parametrize("text, found", [
    ("see /ho" + "me/me/data", True), ("C:\\Us" + "ers\\me", True),
    ("../shared/data", False), ("nbs/work/x", False), ("/ho" + "me page", False),
])
def test_the_pattern_for_machine_paths(text, found):
    assert bool(MACHINE_PATH.search(text)) == found


TRACKS = "0123465"  # in this order the tracks of notebooks are read: the explanations (5x) use everything
MODULES = {  # module -> its file
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "selfdetr").rglob("*.py")) if not path.name.startswith("_")}  # fmt: skip
FACES = {path.parent: path for path in (ROOT / "selfdetr").rglob("__init__.py")}  # they offer what modules define


def place(path):
    """Of a notebook in the reading order."""
    return TRACKS.index(path.name[0]), path.name[:2]


def order():
    """Place of each module in the reading order."""
    modules = {}
    for path in NOTEBOOKS:
        exported = re.search(r"#\|\s*default_exp\s+([\w.]+)", "\n".join(map(source, cells(path))))
        if exported:
            assert path.name[:2].isdigit(), f"{path.name} exports a module but has no place in the reading order"
            assert f"selfdetr.{exported[1]}" not in modules, f"two notebooks export {exported[1]}"
            modules[f"selfdetr.{exported[1]}"] = place(path)
    return modules


@functools.cache
def offered():
    """What the packages offer, `package.name` -> the module that defines it, by the branches of their `__getattr__`."""
    found = {}
    for folder, path in FACES.items():
        parts = folder.relative_to(ROOT).parts
        package = ".".join(parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and isinstance(node.body[0], ast.ImportFrom):
                above = parts[: len(parts) + 1 - node.body[0].level]
                home = ".".join([*above, *filter(None, [node.body[0].module]), node.body[0].names[0].name])
                names = [part.value for part in ast.walk(node.test) if isinstance(part, ast.Constant)]
                assert set(names) <= defined(home), f"{home} does not define what {package} says"
                found |= {f"{package}.{name}": home for name in names}
    return found


@functools.cache
def defined(module):
    """Names that a module defines, not those it imports."""
    found = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        found |= {getattr(target, "id", None) or getattr(target, "name", "") for target in targets}
        found |= {node.target.id} if isinstance(node, ast.AnnAssign) else set()
    return found


def used_modules(syntax, package=""):
    """Modules of the package that code imports, at whatever depth, by the module that defines what is taken."""
    names = offered()
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("selfdetr."))
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            own = ".".join([*base, *filter(None, [node.module])])
            if own.split(".")[0] == "selfdetr":
                full = [f"{own}.{alias.name}" for alias in node.names]
                yield from (each if each in MODULES else names.get(each, own) for each in full)


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name[:2].isdigit()], ids=name)
def test_a_notebook_imports_only_what_was_read_before(path):
    places, own = order(), place(path)
    used = {module for cell in cells(path) for module in used_modules(tree(cell)) if module in MODULES}
    late = {module for module in used if places[module] > own}  # its own module it may look at
    assert not late, "imported before their notebook in the reading order"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_comes_before_it(module):
    """In functions as well, and nothing by a name that is put together when the program runs."""
    places, syntax = order(), ast.parse(MODULES[module].read_text())
    assert module in places, "written by no notebook"
    used = set(used_modules(syntax, module.rpartition(".")[0]))
    assert not {each for each in used if each in MODULES and places[each] >= places[module]}, "a circle, or nearly one"
    assert not {each for each in used if each not in MODULES}, "imported through a package; name the module"
    dynamic = {getattr(node.func, "attr", getattr(node.func, "id", "")) for node in ast.walk(syntax)
               if isinstance(node, ast.Call)} & {"import_module", "__import__"}  # fmt: skip
    assert not dynamic, "imports what no reader of the code sees"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_in_one_sitting(module):
    syntax = ast.parse(MODULES[module].read_text())
    assert len(MODULES[module].read_text().splitlines()) <= 500
    long = {node.name: node.end_lineno - node.lineno + 1 for node in syntax.body if isinstance(node, ast.ClassDef)}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}, "a class over 60 lines wants to be two"


def test_a_public_name_stands_for_one_thing():
    """A newcomer who reads of `Recording` must not have to ask which one."""
    homes = defaultdict(set)
    for module in MODULES:
        exported = re.search(r"__all__ = (\[.*?\])", MODULES[module].read_text(), re.S)
        for name in ast.literal_eval(exported[1]) if exported else ():
            homes[name].add(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", [*MODULES.values(), *FACES.values()], ids=lambda path: "/".join(path.parts[-2:]))
def test_the_package_needs_only_its_run_time_dependencies(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: those for name, those in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    wanted = project["dependencies"] + sum(extras.values(), [])
    installed = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in wanted}
    used = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert used <= installed | set(sys.stdlib_module_names) | {"selfdetr"}


def test_no_module_imports_what_only_an_extra_brings():
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert set(MODULES) <= set(done.stdout.split())
    assert not imported & {"av", "torchvision", "transformers", "onnx", "onnxruntime", "onnxscript", "submitit"}


def test_the_readme_shows_committed_pictures_only():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert "base64" not in text and not (ROOT / "README_files").exists()
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", text)
    local = [link for pair in links for link in pair if link and "://" not in link]
    committed = set(project_files())
    dead = [link for link in local if not (ROOT / link).is_dir() and (ROOT / link).resolve() not in committed]
    assert not dead, "files that a reader of the repository would not find"


def test_the_readme_is_short_and_its_numbers_are_computed():
    """`make readme` executes index.ipynb, so that `make check` notices a number that has changed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.S).split()) <= 600
    shown = "\n".join(source(cell) for cell in cells(ROOT / "nbs" / "index.ipynb") if cell["cell_type"] == "code")
    assert "gather_claims(results)" in shown and '"recommended.json"' in shown
    assert "--execute --inplace nbs/index.ipynb" in made("readme")


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.ipynb")), ids=lambda p: "/".join(p.parts[-2:]))
def test_an_executed_copy_shows_what_its_notebook_draws(path):
    table = path.with_suffix(".json")
    if table.exists() and json.loads(table.read_text())["source"] != source_hash():
        pytest.skip("computed by an older version of the code, as claims.md says")
    draws = re.search(r"plot_|plt\.subplots", (ROOT / "nbs" / f"reproduce_{path.name}").read_text()) is not None
    shown = [output for cell in cells(path) for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert bool(shown) == draws, "pictures are lost with MPLBACKEND=Agg, or where they are closed before the cell ends"


STORED = ("**Stored here**", "## Results")  # how a cell begins that is about the outputs stored in nbs/


def test_an_executed_copy_says_nothing_of_the_outputs_stored_in_nbs():
    said = {path: [source(cell) for cell in cells(path, "markdown")] for path in (ROOT / "nbs").glob("reproduce_*")}
    stray = [path.name for path, texts in said.items() for text in texts
             if re.search("stored (here|in `?nbs)", text, re.I) and not text.startswith(STORED)]
    assert sum(text.startswith(STORED) for texts in said.values() for text in texts) >= len(said) and not stray
    patterns = re.findall(r"RegexRemovePreprocessor\.patterns='(.*?)'", made("reproduce").replace("\\", ""))
    assert len(patterns) == 2 and all(begin.startswith(pattern) for begin, pattern in zip(STORED, patterns))
    copies = {path.relative_to(ROOT): cells(path, "markdown") for path in (ROOT / "results").glob("*/*.ipynb")}
    assert not [path for path, held in copies.items() for cell in held if source(cell).startswith(STORED)]


def test_wheel_and_sdist_hold_the_package_and_nothing_else(tmp_path):
    copy = tmp_path / "copy"
    for path in project_files():
        place = path.relative_to(ROOT)
        if place.parts[0] in ("selfdetr", "tests", "docs", "benchmarks") or len(place.parts) == 1:
            (copy / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / place)
    code = "from setuptools import build_meta as it; it.build_wheel('..'); it.build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, check=True)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "selfdetr").rglob("*.py")}
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in held if name.endswith(".py")} == modules and all(n.startswith("selfdetr/") for n in held)
    members = [member.name.partition("/")[2] for member in tarfile.open(sdist) if member.isfile()]
    assert modules <= set(members) and not [name for name in members if name.startswith(("tests/", "nbs/", "docs/"))]


def test_no_property_fails_because_the_machine_is_busy():
    assert hypothesis.settings().deadline is None  # of conftest.py, for every test
