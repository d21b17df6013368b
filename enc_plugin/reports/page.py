"""Self-contained HTML pages: one file with embedded figures, without scripts, for screens and phones, light and dark.

    page = render("Title", "Plain text is a paragraph.", section("Results", table(["run", "%"], [["a", "1"]])))
    save_page(page, "report.html")

Blocks are :class:`Html`, as the functions below return, or plain text, which becomes an escaped paragraph.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

SHORT = 16  # characters; a table column with texts up to this length is not wrapped


class Html(str):
    """HTML text, which is not escaped again."""

    __slots__ = ()


def render(title: str, *blocks: str) -> str:
    """The whole page: the title as a heading, then the blocks."""
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=_join(blocks))


def save_page(page: str, path: str | Path) -> None:
    """Write a page as UTF-8; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def section(title: str, *blocks: str) -> Html:
    """Blocks under a heading, which :func:`contents` can link to."""
    return Html(f'<section>\n<h2 id="{anchor(title)}">{html.escape(title)}</h2>\n{_join(blocks)}\n</section>')


def contents(*titles: str) -> Html:
    """A list of links to the sections of those titles."""
    return items(*(Html(f'<a href="#{anchor(title)}">{html.escape(title)}</a>') for title in titles))


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub forms it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Html:
    """A table. If it is wider than the page, it scrolls horizontally and its first column stays visible.

    Args:
        head: Names of the columns.
        rows: Cells; the first cell of a row is its heading. Columns of numbers (and empty cells) are aligned right,
            and columns of short texts are not wrapped.
        caption: Description of the table, also for screen readers.
    """
    kinds = [_kind([row[i] for row in rows]) if i and rows else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{_inline(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = "\n".join(
        f'<tr><th scope="row">{_inline(row[0])}</th>'
        + "".join(f"<td{kind}>{_inline(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    label = html.escape(caption or f"Table: {', '.join(head[:3])}")
    text = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}">'
        f"<table>{text}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(picture: bytes, alt: str, caption: str = "") -> Html:
    """An embedded PNG or WebP with an alternative text and a caption below."""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    kind = "webp" if picture.startswith(b"RIFF") else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    return Html(f'<figure><img alt="{html.escape(alt)}" src="{source}">{below}</figure>')


def grid(*figures: Html) -> Html:
    """Figures side by side if the page is wide enough, else one below the other."""
    return Html(f'<div class="grid">\n{_join(figures)}\n</div>')


def details(summary: str, *blocks: str) -> Html:
    """Blocks that are collapsed under a summary line until it is clicked."""
    return Html(f"<details><summary>{html.escape(summary)}</summary>\n{_join(blocks)}\n</details>")


def items(*texts: str) -> Html:
    """A bulleted list."""
    return Html("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")


def note(text: str) -> Html:
    """A paragraph that is highlighted as a warning."""
    return Html(f'<p class="note">{_inline(text)}</p>')


def _inline(text: str) -> str:
    return text if isinstance(text, Html) else html.escape(text)


def _join(blocks: Sequence[str]) -> str:
    return "\n".join(block if isinstance(block, Html) else f"<p>{html.escape(block)}</p>" for block in blocks)


def _kind(cells: Sequence[str]) -> str:
    """HTML attribute of the cells of a column: number, short text or none."""
    if all(_is_number(cell) for cell in cells):
        return ' class="n"'
    return ' class="s"' if max(map(len, cells)) <= SHORT else ""


def _is_number(cell: str) -> bool:
    """Whether the cell is empty or a number: ``1.5 ± 0.2``, ``1.5 (1.2 to 1.9)``, ``1 to 2``, or the ratio ``x1.5``."""
    number = r"[x<+-]*(\d[\d.,]*(e[+-]?\d+)?|nan|inf)%?"
    return re.fullmatch(rf"({number}( (±|to) {number})?( [(\[].*[)\]])*)?", cell) is not None


_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --back: #fff; --line: #d1d9e0; --note: #fff8c5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --back: #0d1117; --line: #3d444d; --note: #3a2d00; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 78rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; margin: 1.2em 0 .5em; }
h1 { font-size: 1.7rem; margin-top: .4rem; }
a { color: inherit; }
p, li { max-width: 62rem; }
h2 { font-size: 1.25rem; border-bottom: 1px solid var(--line); padding-bottom: .2em; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 780px; height: auto; background: #fff; border-radius: 6px; }
figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; padding: .3rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
.wide { overflow-x: auto; margin: .8rem 0; background: /* a shade at the side where more columns are */
  linear-gradient(to left, var(--back) 30%, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) 100% 0 / .9rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; min-width: 4.4rem; border-bottom: 2px solid var(--soft); }
th[scope=row] { position: sticky; left: 0; background: var(--back); min-width: 5rem; max-width: 40vw;
  overflow-wrap: break-word; }
.n { text-align: right; white-space: nowrap; }
.s { white-space: nowrap; }
td:not(.n, .s), td:last-child:not(.n) { min-width: 7rem; }
thead .n, thead .s { white-space: normal; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
.note { background: var(--note); padding: .5rem .8rem; border-radius: 6px; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
