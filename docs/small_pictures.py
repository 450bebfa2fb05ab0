"""Store the pictures of notebooks in a third of the space: `python docs/small_pictures.py FILES` rewrites the files.

A picture of matplotlib has far fewer colours than a PNG file of four channels can hold. Each gets a palette of 256.
"""

import base64
import io
import re
import sys
from pathlib import Path

from PIL import Image

STORED = re.compile(r'(?<="image/png": ")[^"]+(?=")')


def small(found: re.Match[str]) -> str:
    "The base64 text of a picture with a palette. One that has a palette, is transparent or gets no smaller stays."
    old = found[0].replace("\\n", "")
    picture = Image.open(io.BytesIO(base64.b64decode(old)))
    if picture.mode == "P" or picture.convert("RGBA").getextrema()[3][0] < 255:
        return found[0]
    buffer = io.BytesIO()
    palette = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}
    picture.convert("RGB").quantize(256, **palette).save(buffer, "PNG", optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), found[0], key=len)


for path in map(Path, sys.argv[1:]):
    text = path.read_text()
    if (new := STORED.sub(small, text)) != text:
        path.write_text(new)
