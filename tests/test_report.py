"Tables and names of any kind, as a page and as a picture show them."

import html
import io
import re
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from selfdetr import report
from selfdetr.report import drawn, markdown_table, use_fallbacks

HOSTILE = ["either|or", "a\\|b", "$5 and $6", "$\\frac{1}$", "two\nlines", "tab\tbed", "<unk>", "\u00fcbung", "ends\\"]


def test_markdown_shows_names_as_they_are():
    mistune = pytest.importorskip("mistune")
    frame = pd.DataFrame({name: range(len(HOSTILE)) for name in HOSTILE}, pd.Index(HOSTILE, name="a|b"))
    page = mistune.create_markdown(plugins=["table"])(markdown_table(frame))
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)]
    assert len(cells) == (len(HOSTILE) + 1) ** 2 and cells[0] == "a|b"
    wanted = [" ".join(name.splitlines()) for name in HOSTILE]
    assert cells[1 : len(HOSTILE) + 1] == cells[len(HOSTILE) + 1 :: len(HOSTILE) + 1] == wanted
    assert markdown_table(frame).count("$") == markdown_table(frame).count(r"\$")


def drawn_title(name):
    "The title of a picture that has been drawn, and the warnings meanwhile."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure, ax = plt.subplots(figsize=(1, 1))
        ax.set_title(drawn(name))
        use_fallbacks(ax)
        figure.savefig(io.BytesIO())
        plt.close(figure)
    return ax.title, [str(warning.message) for warning in said]


def test_letters_without_a_font_are_said_and_those_of_a_fallback_are_drawn(monkeypatch):
    monkeypatch.setattr(report, "_FALLBACK_FONTS", ())
    title, said = drawn_title("\u8df3\u9ad8")
    assert title.get_text() == "\u25a1\u25a1" and len(said) == 1 and "no font here" in said[0]
    monkeypatch.setattr(report, "_FALLBACK_FONTS", ("STIXNonUnicode", "no such font"))  # comes with matplotlib
    letter = chr(min(report._drawable(("STIXNonUnicode",)) - report._drawable(("sans-serif",))))
    title, said = drawn_title(letter)
    assert title.get_text() == letter and "STIXNonUnicode" in title.get_fontfamily() and not said
