"""Draw the package for ARCHITECTURE.md: `python docs/architecture.py` writes docs/architecture.png.

Rooms, modules and lines are read from selfdetr/; where a room stands is written here.
"""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "selfdetr"
ROOMS = {  # room -> (modules, in the order in which they may import; left and top of its box)
    "method (0x)": ("segments attention transformer model matcher losses feedback diversity intervention", 0.0, 0.0),
    "designs (1x)": ("deformable relational variants scores denoising ensemble designs", 0.0, 3.7),
    "data (2x)": ("data.files data.config data.timegrid data.annotations data.framewise data.releases data.features "
                  "data.dataset data.windows simulate", 4.6, 0.0),
    "training (3x)": ("processes checkpoint resume speed trainer settings", 4.6, 3.65),
    "detecting (3x)": ("inference fusion onnx detector", 9.2, 0.0),
    "judging (4x)": ("report protocols evaluation diagnosis plots", 9.2, 2.05),
    "study (6x)": ("study.spec study.compute study.cache study.pool study.statistics study.tables "
                   "study.evidence", 9.2, 4.35),
    "checking (4x)": ("check.findings check.annotations check.features check.folder check.tables", 13.8, 0.0),
    "extras (5x)": ("video anywhere", 13.8, 2.35),
    "command (5x)": ("cli.arguments cli.commands", 13.8, 4.35),
}  # fmt: skip
FLOWS = [  # what goes from room to room
    ("method (0x)", "designs (1x)", "losses, feedback"),
    ("data (2x)", "method (0x)", "windows"),
    ("data (2x)", "training (3x)", "windows"),
    ("designs (1x)", "training (3x)", "objective"),
    ("data (2x)", "detecting (3x)", "recordings"),
    ("detecting (3x)", "judging (4x)", "detections"),
    ("training (3x)", "study (6x)", "models"),
    ("judging (4x)", "study (6x)", "metrics"),
    ("study (6x)", "command (5x)", "runs"),
]
WIDTH, ROW, HEAD, GAP = 3.4, 0.29, 0.42, 0.04  # of a box, of a line in it, of its title, around it


def modules() -> dict[str, int]:
    "Module, without the package's name, and its lines."
    paths = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_")]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): len(path.read_text().splitlines())
            for path in sorted(paths)}  # fmt: skip


def arrow(axes: Any, start: tuple[float, float, float], end: tuple[float, float, float], what: str) -> None:
    "An arrow between two boxes (left, top, height) with what it carries."
    (x, y, h), (u, v, t) = start, end
    if x == u:  # one above the other
        tail, tip = (x + WIDTH / 2, y + h + GAP), (u + WIDTH / 2, v - GAP)
        place, align = (tail[0] + 0.12, (tail[1] + tip[1]) / 2), "left"
    else:
        right, low, high = u > x, max(y, v), min(y + h, v + t)
        level = (low + high) / 2
        tail, tip = (x + WIDTH + GAP if right else x - GAP, level), (u - GAP if right else u + WIDTH + GAP, level)
        place, align = ((tail[0] + tip[0]) / 2, level - 0.14), "center"
    axes.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "color": "#882255", "linewidth": 1.6})
    axes.text(*place, what, fontsize=7, ha=align, va="center", color="#882255")


def draw(path: Path) -> None:
    "Write the picture."
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    lines, boxes = modules(), {}
    figure, axes = plt.subplots(figsize=(11, 5.6))
    for room, (names, left, top) in ROOMS.items():
        listed = names.split()
        boxes[room] = left, top, HEAD + ROW * len(listed)
        look = {"facecolor": "#EEF4F9", "edgecolor": "#0072B2"}
        axes.add_patch(FancyBboxPatch((left, top), WIDTH, boxes[room][2], f"round,pad={GAP}", **look))
        count = f"{sum(lines[name] for name in listed):,} lines"
        axes.text(left + 0.1, top + 0.2, room, weight="bold", fontsize=8, va="center")
        axes.text(left + WIDTH - 0.1, top + 0.2, count, weight="bold", fontsize=7.5, va="center", ha="right")
        for i, name in enumerate(listed):
            level = top + HEAD + 0.1 + ROW * i
            axes.text(left + 0.1, level, name, fontsize=7.5, va="center", family="monospace")
            number = {"fontsize": 7.5, "va": "center", "ha": "right", "color": "#555555"}
            axes.text(left + WIDTH - 0.1, level, str(lines[name]), **number)
    for start, end, what in FLOWS:
        arrow(axes, boxes[start], boxes[end], what)
    lowest = max(top + height for _, top, height in boxes.values())
    axes.set(xlim=(-0.2, 17.5), ylim=(lowest + 0.2, -0.25))
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "architecture.png")
