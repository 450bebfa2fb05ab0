"""Draw the package for ARCHITECTURE.md: `python docs/architecture.py` writes docs/architecture.png.

Rooms, modules and lines are read from selfdetr/; where a room stands is written here.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "selfdetr"
ROOMS = {  # room -> (modules, a module imports only from modules before it; left, top, width, columns of the box)
    "the method (0x)": ("segments attention transformer model matcher losses feedback diversity", 0.0, 0.0, 3.1, 1),
    "other designs (1x)": ("deformable relational variants denoising designs", 0.0, 3.05, 3.1, 1),
    "data (2x)": ("data.files data.config data.timegrid data.annotations data.releases data.features data.dataset "
                  "data.windows simulate", 3.6, 0.0, 3.1, 1),
    "training (3x)": ("processes checkpoint resume speed trainer", 3.6, 3.35, 3.1, 1),
    "detecting (3x)": ("inference fusion onnx detector", 7.2, 0.0, 3.1, 1),
    "judging (4x)": ("report protocols evaluation diagnosis plots", 7.2, 1.75, 3.1, 1),
    "the study (6x)": ("study.spec study.compute study.cache study.pool study.statistics study.tables",
                       7.2, 3.75, 3.1, 1),
    "checking a folder (4x)": ("check.findings check.annotations check.features check.folder check.tables",
                               10.8, 0.0, 3.1, 1),
    "around (5x)": ("video anywhere", 10.8, 2.05, 3.1, 1),
    "the command (5x)": ("cli.arguments cli.commands", 10.8, 3.3, 3.1, 1),
}  # fmt: skip
FLOWS = [  # what goes from room to room: from, to, what, bend
    ("data (2x)", "the method (0x)", "windows", 0.0),
    ("other designs (1x)", "training (3x)", "objective", 0.0),
    ("the method (0x)", "other designs (1x)", "losses, feedback", 0.0),
    ("data (2x)", "training (3x)", "windows", 0.0),
    ("data (2x)", "detecting (3x)", "recordings", 0.0),
    ("detecting (3x)", "judging (4x)", "detections", 0.0),
    ("training (3x)", "the study (6x)", "model, history", 0.0),
    ("judging (4x)", "the study (6x)", "metrics", 0.0),
    ("the study (6x)", "the command (5x)", "runs, tables", 0.0),
    ("data (2x)", "checking a folder (4x)", "findings", 0.0),
]


def modules() -> dict[str, int]:
    "Module, without the package's name, and its lines."
    paths = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_")]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): len(path.read_text().splitlines())
            for path in sorted(paths)}  # fmt: skip


def imports() -> dict[str, set[str]]:
    "Module -> the modules it imports."
    known, found = modules(), defaultdict(set)
    for module in known:
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        here = ["selfdetr", *module.split(".")[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = here[: len(here) + 1 - node.level] if node.level else []
            own = [*base, *(node.module or "").split(".")]
            full = [".".join(filter(None, [*own, *tail]))[9:] for tail in [[], *([alias.name] for alias in node.names)]]
            found[module] |= {each for each in full if each in known}
    return found


def draw(path: Path) -> None:
    "Write the picture."
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    lines, boxes = modules(), {}
    figure, axes = plt.subplots(figsize=(11, 5.4))
    for room, (names, left, top, width, _) in ROOMS.items():
        listed = names.split()
        height = 0.42 + 0.29 * len(listed)
        boxes[room] = (left, top, width, height)
        axes.add_patch(FancyBboxPatch((left, top), width, height, "round,pad=0.04", facecolor="#EEF4F9", edgecolor="#0072B2"))
        axes.text(left + 0.1, top + 0.2, f"{room}: {sum(lines[name] for name in listed):,} lines", weight="bold", fontsize=8.5, va="center")
        for i, name in enumerate(listed):
            axes.text(left + 0.1, top + 0.52 + 0.29 * i, name, fontsize=8, va="center", family="monospace")
            axes.text(left + width - 0.1, top + 0.52 + 0.29 * i, f"{lines[name]}", fontsize=8, va="center", ha="right", color="#555555")
    for start, end, what, _ in FLOWS:
        (x, y, w, h), (u, v, s, t) = boxes[start], boxes[end]
        if abs(x - u) < 1:  # one above the other
            down = v > y
            a, b = (x + w / 2, y + h + 0.04 if down else y - 0.04), (u + s / 2, v - 0.04 if down else v + t + 0.04)
            place, align = (a[0] + 0.08, (a[1] + b[1]) / 2), "left"
        else:
            right = u > x
            low, high = max(y, v), min(y + h, v + t)
            level = (low + high) / 2 if high > low else (v + 0.3 if v > y else v + t - 0.3)
            a, b = (x + w + 0.04 if right else x - 0.04, level if high > low else min(max(level, y + 0.2), y + h - 0.2)), (u - 0.04 if right else u + s + 0.04, level)
            place, align = ((a[0] + b[0]) / 2, min(a[1], b[1]) - 0.12), "center"
        axes.annotate("", b, a, arrowprops={"arrowstyle": "-|>", "color": "#D55E00", "linewidth": 1.6})
        axes.text(*place, what, fontsize=7, ha=align, va="center", color="#8A3D00")
    axes.set(xlim=(-0.2, 14.1), ylim=(max(t + h for _, t, _, h in boxes.values()) + 0.2, -0.25))
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "architecture.png")
    arrows = imports()
    print(f"{sum(map(len, arrows.values()))} arrows between {len(modules())} modules of {sum(modules().values()):,} lines")
