"""The pictures: drawn on the axes given, labelled, and drawable when there is nothing to show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from selfdetr import plots


pytestmark = pytest.mark.usefixtures("no_pictures_left")


def drawable(axes):
    """Let matplotlib lay out and render the figure, where wrong input to an artist would show."""
    np.asarray(axes, dtype=object).flat[0].figure.canvas.draw()
    return axes


def diversity_frame(seeds=3):
    return pd.DataFrame(
        [
            {"row": row, "part": part, "layer": layer, "diversity": 1.0 / layer + 0.1 * seed, "seed": seed}
            for row in ("baseline", "both")
            for part, depth in (("encoder", 2), ("decoder", 4))
            for layer in range(1, depth + 1)
            for seed in range(seeds)
        ]
    )


def table(dataset="simulated", seeds=3, paper=True):
    rows = []
    for i, name in enumerate(["baseline", "encoder", "decoder", "both"]):
        average = [20.0 + 2 * i + seed * (1 + 0.1 * i) for seed in range(seeds)]
        delta = {"mean": 2.0 * i, "low": 2.0 * i - 1, "high": 2.0 * i + 1} if i and seeds > 1 else None
        rows.append({"name": name, "overrides": {}, "paper": {"0.5": 1.0, "average": 50.0 + i} if paper else None,
                     "mAP": {}, "average": average, "delta": delta})
    return {"table": "table3", "dataset": dataset, "profile": "quick", "seeds": list(range(seeds)), "metric": "mAP",
            "rows": rows, "claims": []}


def segments_frame(rows, columns):
    return pd.DataFrame(rows, columns=columns)


TRUTH = segments_frame([(1.0, 3.0, "a"), (5.0, 9.0, "b")], ["start", "end", "label"])
FOUND = segments_frame([(1.2, 3.1, "a", 0.1), (4.0, 8.0, "b", 0.4), (6.0, 7.0, "c", 0.05)],
                       ["start", "end", "label", "score"])
HISTORY = pd.DataFrame({"step": range(1, 6), "epoch": 0, "lr": 1e-3, "total": [5.0, 4, 3, 2, 1],
                        "class": [1.0, 1, np.nan, 1, 1], "seconds": 0.1})


def test_map_draws_on_the_given_axes_and_sets_bars_at_step_edges():
    _, ax = plt.subplots()
    out = plots.plot_map(torch.rand(5, 10), [[0.2, 0.5]], "title", ax)
    assert drawable(out) is ax
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("title", "key step", "query step")
    box = ax.collections[0].get_paths()[0].get_extents()
    assert (box.x0, box.x1) == pytest.approx((1.5, 4.5))  # steps 2, 3 and 4 of 10 cover 0.2 to 0.5
    assert box.y0 > 4.5 and ax.get_ylim()[0] > box.y1


def test_map_takes_any_device_type_and_no_actions():
    half = torch.rand(4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert np.allclose(plots.plot_map(half).images[0].get_array(), half.detach().float())
    assert drawable(plots.plot_map(np.eye(3), np.zeros((0, 2)))).get_ylim()[0] > 2.5


@pytest.mark.parametrize("shape", [(2, 4, 4), (4,), (0, 4)])
def test_map_refuses_anything_but_one_map(shape):
    with pytest.raises(ValueError, match="one map of shape"):
        plots.plot_map(torch.zeros(shape))


def test_maps_share_one_scale_and_leave_missing_layers_empty():
    weak, strong = torch.full((4, 4), 0.1), torch.full((4, 4), 0.9)
    _, given = plt.subplots(2, 2)
    grid = drawable(plots.plot_maps({"baseline": [weak, strong], "both": [strong]}, axes=given))
    assert grid[0, 0] is given[0, 0]
    for ax in (grid[0, 0], grid[0, 1], grid[1, 0]):
        assert ax.images[0].get_clim() == pytest.approx((0, 0.9))
    assert not grid[1, 1].images and grid[1, 1].texts[0].get_text() == "no layer"
    assert [grid[0, i].get_title() for i in (0, 1)] == ["layer 1", "layer 2"]


@pytest.mark.parametrize("maps", [{}, {"baseline": []}, {"baseline": [], "both": []}])
def test_maps_without_layers(maps):
    grid = drawable(plots.plot_maps(maps))
    assert all(ax.texts[0].get_text() == "no layer" for ax in grid.flat)


def test_diversity_panels_lines_and_band():
    _, given = plt.subplots(1, 2)
    out = drawable(plots.plot_diversity(diversity_frame(), given))
    assert list(out) == list(given)
    assert [ax.get_title() for ax in out] == ["encoder self-attention", "decoder self-attention"]
    assert out[0].get_ylabel() == "diversity d(A)" and all(ax.get_xlabel() == "layer" for ax in out)
    assert out[1].lines[0].get_ydata() == pytest.approx([1 / layer + 0.1 for layer in (1, 2, 3, 4)])
    assert out[0].get_ylim()[0] == 0
    band = out[1].collections[0].get_datalim(out[1].transData)
    assert band.y1 == pytest.approx(1.1 + 4.302653 * 0.1 / np.sqrt(3))  # Student's factor for three seeds


def test_the_relative_form_of_figure_4_is_another_column_with_its_own_label():
    frame = diversity_frame().assign(relative=lambda f: f["diversity"] / 4)
    out = drawable(plots.plot_diversity(frame, value="relative"))
    assert out[0].get_ylabel() == "relative diversity d(A) / ||A||"
    assert out[1].lines[0].get_ydata() == pytest.approx([(1 / layer + 0.1) / 4 for layer in (1, 2, 3, 4)])


def test_diversity_of_one_seed_and_of_no_layers():
    one = drawable(plots.plot_diversity(diversity_frame(seeds=1)))
    assert len(one[0].lines) == 2 and np.isfinite(one[0].lines[0].get_ydata()).all()
    none = drawable(plots.plot_diversity(diversity_frame().head(0)))
    assert len(none) == 1 and none[0].texts[0].get_text() == "no layer"


def test_wrong_number_of_axes_is_an_error():
    with pytest.raises(ValueError, match="1 x 2 axes are needed for this picture, 1 were given"):
        plots.plot_diversity(diversity_frame(), plt.subplots()[1])


def test_timeline_lanes_opacity_and_limit():
    _, ax = plt.subplots()
    out = drawable(plots.plot_timeline(TRUTH, FOUND, limit=2, duration=10, title="video", ax=ax))
    assert out is ax and ax.get_xlim() == (0, 10) and ax.get_xlabel() == "time [s]"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]  # c is third best
    truth_a, found_a, truth_b, found_b = ax.collections
    assert found_b.get_facecolors()[0, 3] == 1 and found_a.get_facecolors()[0, 3] == pytest.approx(0.25)
    colours = [to_hex(lane.get_facecolors()[0]).upper() for lane in (truth_a, truth_b, found_a)]
    assert colours[:2] == [plots.TRUTH_COLOUR] * 2 and colours[2] != plots.TRUTH_COLOUR
    assert "opaque" in ax.texts[-1].get_text()
    truth, found = (lane.get_paths()[0].get_extents() for lane in (truth_b, found_b))
    assert (truth.x0, truth.x1, found.x0, found.x1) == (5, 9, 4, 8) and truth.y1 < found.y0


def test_timeline_of_given_classes():
    ax = drawable(plots.plot_timeline(TRUTH, FOUND, classes=["b", "unseen"]))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b", "unseen"]
    few = plots.plot_timeline(TRUTH, FOUND, classes=["a", "c"], limit=2)  # b has the best detection
    assert [len(lane.get_paths()) for lane in few.collections] == [1, 1, 0, 1]
    assert few.collections[1].get_facecolors()[0, 3] == 1


@pytest.mark.parametrize("truth", [TRUTH, TRUTH.head(0)])
def test_timeline_without_detections(truth):
    ax = drawable(plots.plot_timeline(truth, FOUND.head(0), title="video"))
    assert ax.get_title("left") == "video (no detections)"


def test_losses_one_panel_a_term():
    _, given = plt.subplots(1, 2)
    out = drawable(plots.plot_losses(HISTORY, axes=given))
    assert [ax.get_title() for ax in out] == ["total", "class"] and out[0] is given[0]
    assert out[0].get_xlabel() == "step" and out[0].get_ylabel() == "loss"
    assert len(out[1].lines[0].get_xdata()) == 4  # the step without a value is left out
    two = plots.plot_losses({"baseline": HISTORY, "both": HISTORY}, terms=["total"])
    assert [text.get_text() for text in two[0].get_legend().get_texts()] == ["baseline", "both"]
    assert two[0].lines[-1].get_color() == plots._METHOD_COLOURS["both"]


@pytest.mark.parametrize("history", [HISTORY.head(0), {}, HISTORY[["step"]]])
def test_losses_without_steps(history):
    assert drawable(plots.plot_losses(history))[0].texts[0].get_text() == "no steps"


def test_table_keeps_the_papers_values_off_our_axis():
    _, given = plt.subplots(1, 3)
    ours, paper, difference = drawable(plots.plot_table(table(), given))
    assert [ours, paper, difference] == list(given)
    assert "simulated" in ours.get_title() and "n = 3" in ours.get_title() and "simulated" in difference.get_title()
    assert ours.get_xlabel().startswith("average mAP [%]")
    assert max(np.max(line.get_xdata()) for line in ours.lines) < 50
    assert paper.lines[0].get_xdata() == pytest.approx([50, 51, 52, 53])
    hollow = next(line for line in difference.lines if line.get_marker() == "D")
    assert np.isnan(hollow.get_xdata()[0]) and hollow.get_xdata()[1:] == pytest.approx([1, 2, 3])
    assert hollow.get_markerfacecolor() == "none"


def test_table_draws_the_seeds_their_pairs_and_the_given_interval():
    ours, _, difference = plots.plot_table(table())
    assert ours.lines[0].get_xdata() == pytest.approx([20, 21, 22])
    pairs, interval, mean = difference.lines[:3]
    assert pairs.get_xdata() == pytest.approx([2, 2.1, 2.2])
    assert interval.get_xdata() == pytest.approx([1, 3]) and mean.get_xdata() == pytest.approx([2])


def test_the_title_of_a_table_names_the_row_that_others_are_compared_with():
    rows = table()["rows"]
    assert plots.plot_table(table())[2].get_title().startswith("difference to the baseline")
    turned = [row | {"name": row["name"].replace("baseline", "plain")} for row in rows[1:] + rows[:1]]
    assert plots.plot_table(table() | {"rows": turned})[2].get_title().startswith("difference to plain")


def test_table_of_one_seed_has_means_but_no_intervals():
    ours, _, difference = drawable(plots.plot_table(table(seeds=1)))
    assert [len(line.get_xdata()) for line in ours.lines] == [1] * 8
    assert difference.lines[1].get_xdata() == pytest.approx([2])


def test_table_without_the_paper_and_table_without_rows():
    ours, paper, difference = drawable(plots.plot_table(table(dataset="folder/recordings", paper=False)))
    assert not paper.get_visible() and ours.get_title() == "ours, recordings, n = 3"
    assert "paper" not in difference.get_title()
    drawable(plots.plot_table(table() | {"rows": [], "seeds": []}))


def test_save_is_whole_or_nothing(tmp_path, monkeypatch):
    path = plots.save_picture(plots.plot_table(table()), tmp_path / "new" / "table.png")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(self, target, **kwargs):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plots.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save_picture(plt.figure(), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_colours_are_fixed_by_name():
    colours = plots.method_colours(["other", "both", "baseline", "another", "both"])
    assert list(colours) == ["other", "both", "baseline", "another"] and len(set(colours.values())) == 4
    assert {name: colours[name] for name in ("both", "baseline")} == {
        name: plots._METHOD_COLOURS[name] for name in ("both", "baseline")}


def test_a_design_keeps_its_colour_whatever_it_is_called_and_stands_beside():
    same = [("detr", "baseline"), ("self-detr", "both"), ("DETR", "detr"), ("DETR + feedback", "both"),
            ("tadtr + feedback", "tadtr"), ("x + feedback", "x")]
    for one, other in same:
        colours = plots.method_colours([one, other, "y"])
        assert colours[one] == colours[other] != colours["y"]
    designs = ["detr", "self-detr", "encoder", "decoder", "rtd", "tadtr", "react", "dino"]
    alone = {name: plots.method_colours([name])[name] for name in designs}
    others = [f"row {i}" for i in range(5)]
    together = plots.method_colours([*others, *designs])
    assert {name: together[name] for name in designs} == alone and len({*together.values(), plots.TRUTH_COLOUR}) == 14


def test_feedback_added_to_a_design_is_dashed_and_hollow():
    rows = [row | {"name": name} for row, name in zip(table()["rows"], ("detr", "tadtr", "tadtr + feedback", "rtd"))]
    ours, paper, difference = drawable(plots.plot_table(table() | {"rows": rows}))
    for ax, first in ((ours, 3), (difference, 0)):  # of each row: seeds, interval, mean
        _, plain_interval, plain_mean, _, interval, mean = ax.lines[first : first + 6]
        assert (plain_interval.get_linestyle(), interval.get_linestyle()) == ("-", "--")
        assert interval.get_color() == plain_interval.get_color() == plots._METHOD_COLOURS["tadtr"]
        assert plain_mean.get_markerfacecolor() == plots._METHOD_COLOURS["tadtr"]
        assert mean.get_markerfacecolor() == "white"
    for ax in (paper, difference):  # the paper's number stands in the row it belongs to
        [diamonds] = [line for line in ax.lines if line.get_marker() == "D"]
        assert diamonds.get_ydata().tolist() == [0, 1, 2, 3]


def test_diversity_of_many_methods_has_bars_beside_each_other_instead_of_bands():
    names = ["detr", "rtd", "tadtr", "react", "tadtr + feedback"]
    frame = pd.concat(
        [diversity_frame().query("row == 'both'").assign(row=name) for name in names], ignore_index=True
    )
    encoder, decoder = drawable(plots.plot_diversity(frame))
    first = [line.get_xdata()[0] for line in decoder.lines]
    assert len(set(first)) == 5 and np.mean(first) == pytest.approx(1) and max(np.abs(np.subtract(first, 1))) < 0.5
    assert list(decoder.get_xticks()) == [1, 2, 3, 4] and list(encoder.get_xticks()) == [1, 2]
    bars = decoder.collections[0].get_segments()
    assert bars[0][:, 0] == pytest.approx([first[0]] * 2)
    half = 4.302653 * 0.1 / np.sqrt(3)  # Student's factor for three seeds
    assert bars[0][:, 1] == pytest.approx([1.1 - half, 1.1 + half])
    assert [line.get_linestyle() for line in decoder.lines] == ["-"] * 4 + ["--"]
    few = drawable(plots.plot_diversity(frame[frame["row"].isin(names[:4])]))
    assert {line.get_xdata()[0] for line in few[1].lines} == {1}


# ---- names of any kind


HOSTILE = ["$5 and $6", "$\\frac{1}$", "two\nlines", "tab\tbed", "50 $", "\u00fcbung|\u0448\u0430\u0433", "a_b"]
SHOWN = [r"\$5 and \$6", r"\$\frac{1}\$", "two lines", "tab bed", r"50 \$", HOSTILE[5], "a_b"]


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are():
    rows = [row | {"name": name} for name, row in zip(HOSTILE, table()["rows"] * 2)]
    data = table(dataset="folder/$x^{ and $y") | {"rows": rows}
    ours, *_ = drawable(plots.plot_table(data))
    assert [label.get_text() for label in ours.get_yticklabels()] == SHOWN and r"\$x^{ and \$y" in ours.get_title()
    truth = pd.DataFrame({"start": 0.0, "end": 1.0, "label": HOSTILE})
    ax = drawable(plots.plot_timeline(truth, truth.assign(score=1.0), title="$x^{ and $y"))
    assert sorted(label.get_text() for label in ax.get_yticklabels()) == sorted(SHOWN) and "x^{" in ax.get_title("left")
    drawable(plots.plot_timeline(truth, truth.head(0).assign(score=1.0), title="$x^{ and $y"))
    grid = drawable(plots.plot_maps({name: [np.eye(3)] for name in HOSTILE}))
    assert [ax.get_ylabel().split("\n")[0] for ax in grid[:, 0]] == SHOWN
    drawable(plots.plot_map(np.eye(3), title="$x^{ and $y"))
    frame = pd.concat([diversity_frame().query("row == 'both'").assign(row=name) for name in HOSTILE])
    legend = drawable(plots.plot_diversity(frame))[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == SHOWN
    losses = drawable(plots.plot_losses({name: HISTORY.rename(columns={"class": "$x^{_$"}) for name in HOSTILE}))
    assert [text.get_text() for text in losses[0].get_legend().get_texts()] == SHOWN


def test_letters_that_no_font_has_are_said_once():
    truth = pd.DataFrame({"start": 0.0, "end": 1.0, "label": [chr(0x10FF00 + i) for i in range(9)]})
    with pytest.warns(UserWarning) as said:
        drawable(plots.plot_timeline(truth, truth.assign(score=1.0)))
    assert {str(warning.message) for warning in said} == {str(said[0].message)} and "no font" in str(said[0].message)


# ---- folds


def test_a_table_of_folds_draws_a_dot_for_each_fold():
    "Six values as three folds with two seeds each."
    folded = table(seeds=6) | {"folds": ["1", "2", "3"], "seeds": [0, 1]}
    ours, _, difference = drawable(plots.plot_table(folded))
    assert ours.lines[0].get_xdata() == pytest.approx([20.5, 22.5, 24.5])
    assert difference.lines[0].get_xdata() == pytest.approx([2.05, 2.25, 2.45])
    assert "n = 3 folds x 2 seeds" in ours.get_title() and "small: a fold" in ours.get_xlabel()
    one = plots.plot_table(table(seeds=2) | {"folds": ["3"]})[0]
    assert one.lines[0].get_xdata() == pytest.approx([20, 21]) and "small: a seed" in one.get_xlabel()


def test_diversity_of_folds_has_the_interval_over_folds():
    "Three folds whose seeds cancel: no band is left."
    folds = pd.concat([diversity_frame(2).assign(fold=fold) for fold in "123"])
    _, given = plt.subplots(1, 2)
    band = plots.plot_diversity(folds, given)[0].collections[0].get_paths()[0].vertices[:, 1]
    assert set(np.round(band, 6)) == {0.55, 1.05}
