"""Sphinx's settings, and what the site adds to it: equations as MathML, parameter comments, links on names.

Equations need no script and nothing from elsewhere: `math_core` turns them into MathML, which browsers draw themselves,
and the site brings a font for them.
"""

import re
import shutil
import sys
from collections import defaultdict
from functools import cached_property
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from math_core import LatexError, LatexToMathML
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from selfdetr import __version__  # noqa: E402

project, author, release = "selfdetr", "the selfdetr developers", __version__
copyright = f"2026 onwards, {author}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md"]  # index.md includes it
highlight_language = "none"  # of blocks that name no language; code cells are Python all the same

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # outputs in Markdown may hold tables
smartquotes_action = "De"  # quotation marks stay as they are written
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand beside the parameters
autodoc_preserve_defaults = True
viewcode_follow_imported_members = False

html_theme = "furo"
html_title = project
html_static_path = ["_static", str(Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def visit_math(self, node):
    "An equation as MathML."
    display = isinstance(node, nodes.math_block)
    try:
        mathml = LatexToMathML().convert_with_local_state(node.astext(), displaystyle=display)
    except LatexError as error:
        logging.getLogger(__name__).warning("equation %s: %s", node.astext(), error, location=node)
        mathml = node.astext()
    self.body.append(f'<div class="equation">{mathml}</div>' if display else mathml)
    raise nodes.SkipNode


def as_rest(text):
    "A line of a docstring as reStructuredText: code in backticks, everything else as it stands."
    parts = text.split("`")
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([\\*|_])", r"\\\1", part) for i, part in enumerate(parts))


def add_comments(app, what, name, obj, options, lines):
    "The docstring as it is written here, and the comments on parameters, which Sphinx does not read."
    lines[:] = [as_rest(line) for line in lines]
    if what not in ("function", "method", "class", "exception"):
        return
    lines.append("")
    for parameter, about in docments(obj, full=True).items():
        note, annotated = as_rest(" ".join((about.docment or "").split())), about.anno not in (None, Parameter.empty)
        if parameter == "return" and annotated:
            plain = re.sub(r"[\w.]+\.(?=\w)", "", stringify_annotation(about.anno))
            own = getattr(about.anno, "__module__", "").startswith(f"{project}.")
            lines.append(f":returns: {f'``{plain}``' if own else f'*{plain}*'}{note and f' – {note}'}")
        elif parameter != "return" and (note or annotated):
            lines.append(f":param {parameter}: {note}")
            if annotated:
                lines.append(f":type {parameter}: {stringify_annotation(about.anno, 'smart')}")
    lines.append("")


def skip_member(app, what, name, obj, skip, options):
    "Fields of a dataclass stand among its parameters already."
    method = callable(obj) or isinstance(obj, (property, cached_property, classmethod, staticmethod))
    return True if what == "class" and not method else None


def number_title(app, doctree):
    "Menus give a notebook's number beside its title. Executed copies are left to their notebook in the search."
    page = app.env.docname
    numbered = re.match(r"nbs/(\d+)_", page)
    if numbered:
        for title in (app.env.titles[page], app.env.tocs[page].next_node(nodes.reference)):
            title.insert(0, nodes.Text(f"{numbered[1]} · "))
    if re.match("results/.+/", page):
        app.env.metadata[page]["nosearch"] = True


def link_names(app, doctree, docname):
    "Names of notebooks and of what the package exports become links where prose has them in backticks."
    env = app.env
    pages = {name.removeprefix("nbs/"): name for name in env.found_docs if name.startswith("nbs/")}
    exported = defaultdict(list)
    for full, entry in env.domaindata["py"]["objects"].items():
        for name in {full, full.split(".", 2)[-1]}:  # selfdetr.data.TimeGrid and TimeGrid
            exported[name].append(entry)
    for node in list(doctree.findall(nodes.literal)):
        text, name = node.astext(), node.astext().removesuffix("()")
        target = None
        if text in pages and pages[text] != docname:
            target = pages[text], ""
        elif len(exported[name]) == 1 and re.search(r"[A-Z_.()]", text):  # a lone lower-case word may mean anything
            target = exported[name][0].docname, exported[name][0].node_id
        if target and not isinstance(node.parent, (nodes.reference, nodes.title)):
            node.replace_self(make_refnode(app.builder, docname, *target, node.deepcopy()))


def copy_whole_pages(app, exception):
    "Pages that are HTML already keep their place."
    if exception is None and app.builder.format == "html":
        for path in Path(app.srcdir).glob("results/*/*.html"):
            target = Path(app.outdir) / path.relative_to(app.srcdir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-process-docstring", add_comments)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-read", number_title, priority=900)  # after Sphinx has taken the title
    app.connect("doctree-resolved", link_names)
    app.connect("build-finished", copy_whole_pages)
