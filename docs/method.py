"""Draw Self-DETR for the README: `python docs/method.py` writes docs/method.png (after Figure 2 of the paper)."""

from pathlib import Path
from typing import Any

PLAIN, FEEDBACK, MAP = "#444444", "#009E73", "#0072B2"
BOXES = {  # name -> left, bottom, width, height, text
    "features": (-0.1, 1.15, 1.6, 1.0, "features\nof a window\n(steps × channels)"),
    "encoder": (2.0, 0.55, 2.3, 2.2, ""),
    "encoder self-attention": (2.15, 1.55, 2.0, 0.95, "self-attention\n(steps × steps)"),
    "encoder network": (2.15, 0.75, 2.0, 0.5, "feed-forward network"),
    "queries": (4.95, 3.25, 1.25, 0.45, "action queries"),
    "decoder": (4.8, 0.05, 4.0, 2.75, ""),
    "decoder self-attention": (4.95, 1.7, 1.7, 0.9, "self-attention\n(queries × queries)"),
    "cross-attention": (6.95, 1.7, 1.7, 0.9, "cross-attention\n(queries × steps)"),
    "decoder network": (6.7, 0.95, 2.0, 0.45, "feed-forward network"),
    "heads": (5.1, 0.2, 3.4, 0.5, "scores and segments of every layer"),
    "losses": (9.4, 0.0, 1.8, 0.95, "matching, losses\n(Eqs. 7 to 9)"),
    "guidance": (9.4, 1.4, 1.8, 1.55, "guidance\n$G_D=\\sqrt{A_C A_C^\\top}$"
                 "\n$G_E=\\sqrt{A_C^\\top A_C}$\n(Eqs. 2, 3)"),
}  # fmt: skip
TITLES = {"encoder": "encoder, 2 layers  [02]", "decoder": "decoder, 4 layers  [02]"}
CHAPTERS = {
    "features": "28", "encoder self-attention": "01", "decoder self-attention": "01", "cross-attention": "01",
    "heads": "03", "losses": "04, 05", "guidance": "06",
}  # fmt: skip


def corner(name: str, x: float, y: float) -> tuple[float, float]:
    "A point of a box, in shares of its width and height."
    left, bottom, width, height, _ = BOXES[name]
    return left + x * width, bottom + y * height


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = PLAIN) -> None:
    "A straight arrow."
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6})


def path(axes: Any, points: list[tuple[float, float]], colour: str) -> None:
    "An arrow along straight lines."
    xs, ys = zip(*points[:-1])
    axes.plot(xs, ys, color=colour, linewidth=1.6, solid_joinstyle="round")
    arrow(axes, points[-2], points[-1], colour)


def draw(file: Path) -> None:
    "Write the picture."
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure, axes = plt.subplots(figsize=(11, 4.9))
    for name, (left, bottom, width, height, text) in BOXES.items():
        outer, green = name in TITLES, name == "guidance"
        attention = "attention" in name
        face = "#F4F4F4" if outer else "#E3F4EE" if green else "#E1EEF7" if attention else "white"
        edge = FEEDBACK if green else MAP if attention else PLAIN
        axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08",
                                      facecolor=face, edgecolor=edge, linewidth=1.2))  # fmt: skip
        chapter = f"\n[{CHAPTERS[name]}]" if name in CHAPTERS else ""
        axes.text(left + width / 2, bottom + height / 2, text + chapter, ha="center", va="center", fontsize=9)
        if outer:
            axes.text(left + width, bottom - 0.24, TITLES[name], ha="right", fontsize=9.5, weight="bold")
    arrow(axes, corner("features", 1, 0.5), corner("encoder", 0, 0.5))
    arrow(axes, corner("encoder self-attention", 0.5, 0), corner("encoder network", 0.5, 1))
    memory = corner("encoder network", 1, 0.5)
    path(axes, [memory, (4.55, memory[1]), (4.55, -0.42), (9.1, -0.42), (9.1, 1.9), (8.67, 1.9)], PLAIN)
    axes.text(4.65, -0.34, "memory", fontsize=8.5, color=PLAIN)
    below = corner("queries", 0.5, 0)
    arrow(axes, below, (below[0], corner("decoder self-attention", 0, 1)[1]))
    arrow(axes, corner("decoder self-attention", 1, 0.5), corner("cross-attention", 0, 0.5))
    arrow(axes, corner("cross-attention", 0.5, 0), corner("decoder network", 0.55, 1))
    arrow(axes, corner("decoder network", 0.5, 0), corner("heads", 0.765, 1))
    arrow(axes, corner("heads", 1, 0.5), corner("losses", 0, 0.5))
    cross, guide = corner("cross-attention", 1, 0.75), corner("guidance", 0, 0.6)
    arrow(axes, cross, (guide[0], cross[1]), MAP)
    axes.text(8.95, cross[1] + 0.08, "$A_C$", fontsize=10, color=MAP)
    high = 3.95
    for share, target, name in ((0.35, "decoder self-attention", "$G_D$ guides $A_D$ (Eq. 6)"),
                                (0.65, "encoder self-attention", "$G_E$ guides $A_E$ (Eqs. 4, 5)")):  # fmt: skip
        start, end = corner("guidance", share, 1), corner(target, 0.87 if "decoder" in target else 0.5, 1)
        level = high if "decoder" in target else high + 0.35
        path(axes, [start, (start[0], level), (end[0], level), end], FEEDBACK)
        axes.text((max(end[0], 2.9) + 0.15), level + 0.06, name, fontsize=9, color=FEEDBACK)
    axes.set(xlim=(-0.2, 11.3), ylim=(-0.6, 4.75))
    axes.axis("off")
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parent / "method.png")
