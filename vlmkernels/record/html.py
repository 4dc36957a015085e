"""The frame of all pages: one self-contained HTML file, in light and dark colors, for wide and narrow screens."""

import base64
import io
import math
import re
from html import escape
from typing import Any, NamedTuple

from PIL import Image

THUMBNAIL_SIDE = 192  # maximum number of pixels of the longer side
_SOURCE = re.compile(r"data:image/[a-z]+;base64,[\w+/=]*", re.ASCII)

STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --good: 46 160 67; --bad: 218 54 51; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.summary { opacity: .75; margin: .2rem 0 1.5rem; }
section { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; overflow-x: auto; }
header { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; padding: .8rem 1rem; background: var(--soft); }
header small { display: block; opacity: .75; margin-top: .3rem; overflow-wrap: anywhere; }
header img { border-radius: 6px; border: 1px solid var(--line); max-width: 100%; height: auto; }
img { background: #fff; } img.small { image-rendering: pixelated; }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid var(--line); padding: .35rem .7rem; text-align: right; vertical-align: top; }
th { font-weight: 600; font-size: .85rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; width: 100%; }
td { font-variant-numeric: tabular-nums; }
td pre { min-width: 8rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding: .3rem .4rem; } td pre { min-width: 5rem; } }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.curves svg { width: 100%; height: auto; overflow: visible; } figure { margin: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } figcaption output { opacity: .7; }
.wide { overflow-x: auto; }
.turns { display: grid; gap: .45rem; } .whole td { border-top: 0; padding-top: 0; }
.turn { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0 .6rem; }
.turn { border-left: 3px solid var(--line); padding-left: .6rem; }
.turn small, .reasoning { opacity: .75; overflow-wrap: anywhere; } .turn > div { display: grid; gap: .25rem; }
.trained, .legend { border-left: 3px solid #3b82f6; } .legend { margin-left: 1rem; padding-left: .35rem; }
.error pre, .error small { color: rgb(var(--bad)); }
.call { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0 .35rem; justify-self: start; }
.shots { display: flex; flex-wrap: wrap; gap: .4rem; }
.shot { border: 1px solid var(--line); border-radius: 4px; max-width: 100%; box-sizing: border-box; print-color-adjust: exact; }
.shot { background: #fff center / 100% 100% no-repeat; } .shot.small { image-rendering: pixelated; }
@media (max-width: 40rem) { .turn { grid-template-columns: minmax(0, 1fr); } }
"""


class Thumbnail(NamedTuple):
    """A small image: its data URI, its size on the page in pixels, and whether the page magnifies it."""

    source: str
    width: int
    height: int
    magnified: bool

    @classmethod
    def from_json(cls, value: Any) -> "Thumbnail":
        """Read a stored thumbnail.

        Raises:
            ValueError, TypeError: the value is not a thumbnail, or its source is not a data URI, which a page must not load.
        """
        image = cls(*value)
        if not _SOURCE.fullmatch(image.source) or not all(isinstance(side, int) for side in (image.width, image.height)):
            raise ValueError(f"the source of an image must be a data URI, and its sides whole numbers, got {value!r:.80}")
        return image


def thumbnail(image: Image.Image) -> Thumbnail:
    """Scale an image down to ``THUMBNAIL_SIDE`` pixels, or let the page magnify a smaller image up to four times."""
    scale = THUMBNAIL_SIDE / max(image.size)
    width, height = (max(1, round(side * min(scale, 4))) for side in image.size)
    resized = image if scale >= 1 else image.resize((width, height), Image.Resampling.LANCZOS)
    data, kind = io.BytesIO(), "png" if scale >= 1 else "jpeg"
    resized.convert("RGB").save(data, kind, quality=85)
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return Thumbnail(source, width, height, scale >= 1)


def picture(image: Thumbnail) -> str:
    """Return an img element."""
    style_class = ' class="small"' if image.magnified else ""
    return f'<img{style_class} width="{image.width:d}" height="{image.height:d}" alt="" src="{escape(image.source)}">'


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page; ``style`` is further CSS."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en">{head}<style>{STYLE}{style}</style>{body}</html>\n'


def number(value: float) -> str:
    """Format a number with four significant digits, and a whole number with all its digits."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def short(value: float) -> str:
    """Format a number with three significant digits and k, M, G or T."""
    if not 1e3 <= abs(value) < 1e15:
        return f"{value:.3g}"
    power = min(int(math.log10(abs(value))) // 3, 4)
    return f"{value / 1e3**power:.3g}{'kMGT'[power - 1]}"
