"""Words that we do not use: `python docs/check_words.py` names each place in notebooks and pages, and ends with 1."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("mend", "mends", "mended", "mending", "whoever", "whatever", "nobody", "beside", "anew", "thereby", "hence")
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b", re.I)
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)


def pages() -> list[Path]:
    "Notebooks and pages of the repository that people write or read."
    patterns = ("*.md", "docs/*.md", "benchmarks/*.md", "nbs/*.ipynb", "results/*.md", "results/*/*.md")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def prose(path: Path) -> Iterator[tuple[str, str]]:
    "The parts of a page that are no code, each with its place."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield path.name, text
        return
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "markdown":
            yield f"{path.name}, cell {cell['id']}", "".join(cell["source"])


def found(paths: list[Path]) -> list[str]:
    "Every use of one of the words, with its place and what stands around it."
    lines = []
    for path in paths:
        for place, text in prose(path):
            text = CODE.sub(" ", text)
            for match in PATTERN.finditer(text):
                around = text[max(match.start() - 30, 0) : match.end() + 30].replace("\n", " ")
                lines.append(f"{place}: '{match[0]}' in '{around}'; choose another word")
    return lines


if __name__ == "__main__":
    lines = found(pages())
    print("\n".join(lines))
    sys.exit(bool(lines))
