"""Lay out the sources of the site: what it shows, in the repository's own folders, so that relative links stay right.

`python docs/gather.py FOLDER` copies notebooks, pages and whatever they link to into FOLDER and adds the pages that
no one writes: one for each module, one for each folder of results. Notebooks lose what only nbdev needs. Standard
library only: the tests use it without Sphinx.
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "ARCHITECTURE.md", "benchmarks/README.md", "docs/guide.md", "docs/glossary.md")
PAGES += ("docs/notebooks.md", "results/README.md", "results/claims.md")
LINK = re.compile(r"""\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=["']([^"']+)["']""")
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
HIDE = re.compile(r"^\s*#\s*\|\s*(hide|hide_input|hide_output)\s*$", re.M)
TAGS = {"hide_input": "remove-input", "hide_output": "remove-output"}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_progress(output: dict) -> bool:
    "Whether an output is a progress bar, which says nothing on a page."
    if output.get("name") != "stderr":
        return False
    text = "".join(output["text"])
    return not text.strip() or re.search(r"\d+%\|", text) is not None


def notebook(path: Path) -> dict:
    "A notebook as the site shows it: no front matter, no hidden cells, no directives, no progress bars."
    content = json.loads(path.read_text(encoding="utf-8"))
    executed = "results" in path.relative_to(ROOT).parts
    cells = []
    for cell in content["cells"]:
        if cell["cell_type"] == "raw":
            continue
        if cell["cell_type"] == "code":
            hidden = HIDE.findall(source(cell))
            tags = [*cell["metadata"].get("tags", []), *(TAGS[name] for name in hidden if name in TAGS)]
            if re.search(r"^\s*#\s*\|\s*exporti?\b", source(cell), re.M):
                tags.append("exported")
            code = DIRECTIVE.sub("", source(cell)).strip("\n")
            if "hide" in hidden or not code:
                continue
            outputs = [output for output in cell["outputs"] if not is_progress(output)]
            cell = cell | {"source": code, "metadata": {"tags": tags}, "outputs": outputs}
        cells.append(cell)
    if executed:
        title = source(cells[0]).split("\n", 1)
        note = "\n*Executed by `make reproduce`. [Claims](../claims.md) says whether the code has changed since.*"
        cells[0] = cells[0] | {"source": "\n".join([f"{title[0]} ({path.parent.name})", *title[1:], note])}
    return content | {"cells": cells}


def shown(path: Path) -> str:
    "The text of a page or notebook as the site has it."
    text = json.dumps(notebook(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w./-]+)\.md\)", text):  # the notebook shows the same table, and more
        if (path.parent / f"{link}.ipynb").exists():
            text = text.replace(f"]({link}.md)", f"]({link}.ipynb)")
    return text


def whole_page(path: Path) -> str:
    "A page that is HTML already, as the site has it: where it links to notebooks, the site has pages."
    return re.sub(r"""(href=["'][^"':]+)\.ipynb(?=["'])""", r"\1.html", path.read_text(encoding="utf-8"))


def local_links(path: Path) -> list[str]:
    "Relative links of a page or notebook as the site has it, in or outside of it, without what follows a #."
    text = shown(path)
    if path.suffix == ".ipynb":
        text = "\n\n".join(source(cell) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)  # code links to nothing
    found = ["".join(pair).split("#")[0] for pair in LINK.findall(text)]
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def documents() -> list[Path]:
    "Notebooks and pages of the site, in the repository."
    notebooks = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.name != "index.ipynb"]  # is the README
    return notebooks + sorted((ROOT / "results").glob("*/*.ipynb")) + [ROOT / page for page in PAGES]


def modules() -> dict[str, str]:
    "Module, without the package's name, and the notebook it is written in."
    found = {}
    for path in sorted((ROOT / "selfdetr").rglob("[!_]*.py")):
        match = re.search(r"File to edit: (?:\.\./)+(nbs/\w+\.ipynb)", path.read_text(encoding="utf-8"))
        if match:
            found[".".join(path.relative_to(ROOT / "selfdetr").with_suffix("").parts)] = match[1]
    return found


def constants(module: str) -> str:
    "Exported values and types of a module as the code defines them; docstrings say nothing about these."
    text = (ROOT / "selfdetr" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines, parts = text.splitlines(), []
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]
        if names:
            code = indent("\n".join(lines[node.lineno - 1 : node.end_lineno]), " " * 6)
            head = f".. py:data:: {names[0]}\n   :module: selfdetr.{module}\n"
            head += "   :no-index:\n" if isinstance(node, ast.AugAssign) else ""  # more of what stands above
            parts.append(f"{head}\n   .. code-block:: python\n\n{code}\n")
    return "## Values and types\n\n```{eval-rst}\n" + "\n".join(parts) + "```\n" if parts else ""


def module_page(module: str, written_in: str) -> str:
    "The page of a module; what it shows is read from the docstrings."
    return f"""# {module}

The notebook [{Path(written_in).stem}](../{written_in}) explains, shows and tests this module.

```{{eval-rst}}
.. automodule:: selfdetr.{module}
   :members:
   :undoc-members:
```

{constants(module)}"""


def results_page(folder: Path) -> str:
    "The page of a folder of results."
    dataset, _, profile = folder.name.rpartition("-")
    names = [path.stem for path in folder.glob("*.ipynb")]
    listed = "\n".join(sorted(names, key=lambda name: (not name.startswith("table"), name)))
    return f"""# Data set {dataset}, profile {profile}

The notebooks as `make reproduce` executed them. Each table carries the hash of the code that computed it.
[What holds](../claims.md) names the tables that are older than the present code, and
[What is identical to the reference](../../nbs/55_reference.ipynb) says what has changed since.

```{{toctree}}
{listed}
```
"""


def write(path: Path, content: str | Path) -> None:
    "Write a text, or copy a file, into folders that need not exist yet."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_text(content, encoding="utf-8")


def gather(folder: Path) -> None:
    "Write the sources of the site into a folder; a page that links to what does not exist ends the program."
    pages = documents()
    write(folder / "index.md", ROOT / "docs" / "index.md")
    for path in pages:
        write(folder / path.relative_to(ROOT), shown(path))
        for link in local_links(path):
            target = (path.parent / link).resolve()
            if not (target.is_file() and target.is_relative_to(ROOT)):
                raise SystemExit(f"{path.relative_to(ROOT)}: links to {link}, which is no file of the repository")
            if target not in pages:
                write(folder / target.relative_to(ROOT), whole_page(target) if target.suffix == ".html" else target)
    for module, written_in in modules().items():
        write(folder / "api" / f"{module}.md", module_page(module, written_in))
    for results in {path.parent for path in pages if path.parent.parent.name == "results"}:
        write(folder / "results" / results.name / "index.md", results_page(results))


if __name__ == "__main__":
    gather(Path(sys.argv[1]).resolve())
