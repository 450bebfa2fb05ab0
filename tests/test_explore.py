"""The page to explore attention: one small file with the data it says, and in a browser, where there is one."""

import base64
import json
import re
import shutil
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from selfdetr.diversity import diversity
from selfdetr.feedback import decoder_guidance, encoder_guidance

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE, NOTEBOOK = ROOT / "docs" / "explore.html", ROOT / "nbs" / "59_explore.ipynb"
PAGE = ROOT / "results" / "simulated-quick" / "explore.html"
HOLDER = '<script id="data" type="application/json">{{DATA}}</script>'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@cache
def read():
    """What the committed page holds, and its maps: kind -> (models, windows, epochs, layers, heads, rows, columns)."""
    text = PAGE.read_text(encoding="utf-8")
    page = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    raw, maps, start = zlib.decompress(base64.b64decode(page["maps"])), {}, 0
    for kind, shape in page["shapes"].items():
        size = int(np.prod(shape))
        weights = np.frombuffer(raw, np.uint8, size, start).reshape(shape) / 255
        maps[kind] = weights * np.reshape(page["largest"][kind], (*shape[:5], 1, 1))
        start += size
    assert start == len(raw)
    return page, maps


def test_the_page_is_its_template_with_data():
    template, page = TEMPLATE.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    assert template.count("{{DATA}}") == 1 and HOLDER in template
    before, after = template.split("{{DATA}}")
    assert page.startswith(before) and page.endswith(after), "run nbs/59_explore.ipynb again"


@pytest.mark.parametrize("path", [TEMPLATE, PAGE], ids=lambda path: path.parent.name)
def test_the_page_is_small_and_loads_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 2e6
    assert not re.search(r"https?:|<link|<img|<iframe|\bsrc=|@import|url\(|fetch\(|\bimport\b", text)
    assert re.findall(r'href="([^"]+)"', text) == ["../../nbs/59_explore.ipynb"]


def test_every_control_has_a_label():
    text = TEMPLATE.read_text(encoding="utf-8")
    inside = "".join(re.findall(r"<label>.*?</label>", text))
    controls = re.findall(r"<(?:input|select)\b", text)
    assert len(controls) == len(re.findall(r"<(?:input|select)\b", inside)) == 7


def test_the_shapes_agree_with_what_the_page_names():
    page, maps = read()
    models, windows, epochs, layers, heads, steps, _ = page["shapes"]["encoder"]
    queries, decoder_layers = page["shapes"]["decoder"][5], page["shapes"]["decoder"][3]
    first = [models, windows, epochs]
    assert first == [len(page["models"]), len(page["windows"]), len(page["epochs"])] and page["epochs"][0] == 0
    assert page["shapes"] == {
        "encoder": [*first, layers, heads, steps, steps],
        "decoder": [*first, decoder_layers, heads, queries, queries],
        "cross": [*first, decoder_layers, heads, queries, steps],
        "encoder_guidance": [*first, 1, 1, steps, steps],
        "decoder_guidance": [*first, decoder_layers, 1, queries, queries],
    }
    assert {name: len(values) for name, values in page["largest"].items()} == {
        name: np.prod(shape[:5]) for name, shape in page["shapes"].items()
    }


def test_the_rows_of_every_map_sum_to_one():
    for kind, maps in read()[1].items():
        slack = 0.5 / 255 * maps.max((-2, -1)) * maps.shape[-1]  # each weight is half a part off at the most
        assert (np.abs(maps.sum(-1) - 1) <= slack[..., None] + 1e-3).all(), kind


def test_the_guidance_is_that_of_the_cross_attention():
    maps = read()[1]
    for model, window, epoch in np.ndindex(maps["cross"].shape[:3]):
        cross = torch.from_numpy(maps["cross"][model, window, epoch].mean(1)[:, None])  # (layers, 1, queries, steps)
        made = {"encoder": encoder_guidance(cross)[0], "decoder": decoder_guidance(cross)[:, 0]}
        for part, guidance in made.items():
            stored = maps[f"{part}_guidance"][model, window, epoch, :, 0].reshape(guidance.shape)
            np.testing.assert_allclose(stored, guidance, atol=0.05 * stored.max())  # the root enlarges what is rounded


def test_the_diversity_is_that_of_the_maps():
    page, maps = read()
    for part in ("encoder", "decoder"):
        every = np.concatenate([maps[part].mean(4, keepdims=True), maps[part]], axis=4)
        for kind, own in ((part, every), (f"{part}_guidance", maps[f"{part}_guidance"])):
            stored = np.reshape(page["diversity"][kind], own.shape[:5])
            np.testing.assert_allclose(stored, diversity(torch.from_numpy(own)), atol=0.02, rtol=0.02)


def test_before_the_training_both_models_are_one():
    page, maps = read()
    for kind, values in maps.items():
        np.testing.assert_array_equal(values[0, :, 0], values[1, :, 0], err_msg=kind)
    segments = np.array(page["segments"])
    assert segments.shape == (*page["shapes"]["decoder"][:3], page["shapes"]["decoder"][5], 4)
    centres = segments[..., :2].mean(-1)
    assert (np.diff(centres, axis=-1) >= -0.01).all(), "queries are sorted by time"
    assert (0 <= segments[..., 2]).all() and (segments[..., 2] <= 1).all()


def test_the_notebook_stores_a_picture_and_no_widget():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in outputs)
    assert not any("widget" in mime for data in outputs for mime in data), "without a kernel it is an error message"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser is here")
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser):
    """The page, open and ready; its errors fail the test."""
    opened = browser.new_page(viewport={"width": 1000, "height": 1000})
    errors = []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(PAGE.as_uri())
    opened.wait_for_selector("body[data-ready]")
    yield opened
    assert errors == []
    opened.close()


def points_at(tab, canvas):
    """Row, column and weight of the cell in the middle of a panel, as the page says them."""
    tab.locator(canvas).scroll_into_view_if_needed()
    box = tab.locator(canvas).bounding_box()
    tab.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.4 * box["height"])
    tab.wait_for_function("document.getElementById('said').textContent.includes('weight')")
    said = tab.locator("#said").inner_text()
    row, column = re.findall(r"(?:step|query) (\d+) \(", said)
    return int(row), int(column), float(re.search(r"weight (\d\.\d+)", said)[1])


def test_the_page_shows_the_stored_weights_at_every_position(tab):
    page, maps = read()
    positions = (0, 0, "encoder", 1, 0), (1, 1, "encoder", 2, 3), (2, 3, "decoder", 4, 0), (0, 2, "decoder", 3, 2)
    for position in positions:
        window, epoch, part, layer, head = position
        tab.evaluate(f"location.hash = 'window={window}&epoch={epoch}&part={part}&layer={layer}&head={head}'")
        label = "document.getElementById('self0').getAttribute('aria-label')"
        tab.wait_for_function(f"{label}.includes('{part} layer {layer}')")
        for model in (0, 1):
            own = maps[part][model, window, epoch, layer - 1]
            row, column, weight = points_at(tab, f"#self{model}")
            expected = own.mean(0) if head == 0 else own[head - 1]
            assert weight == pytest.approx(expected[row, column], abs=1e-4), position


def test_controls_work_by_keyboard(tab):
    tab.locator("#epoch").focus()
    tab.keyboard.press("Home")
    assert tab.locator("output[for=epoch]").inner_text() == "0"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("output[for=epoch]").inner_text() == str(read()[0]["epochs"][1])
    tab.locator("[value=decoder]").check()
    tab.locator("#layer").focus()
    tab.keyboard.press("End")
    assert tab.locator("output[for=layer]").inner_text() == "4 of 4"
    tab.locator("#cross1").focus()
    tab.keyboard.press("ArrowDown")
    tab.wait_for_function("document.getElementById('said').textContent.includes('cross-attention: query 10')")
    tab.keyboard.press("ArrowDown")
    tab.wait_for_function("document.getElementById('said').textContent.includes('cross-attention: query 11')")
    assert "part=decoder&layer=4" in tab.url
