"""Pages: well formed, escaped, and complete in one file."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from enc_plugin.reports import page
from enc_plugin.reports.page import Html, details, figure, grid, items, note, render, section, table

VOID = {"meta", "img", "br", "link"}


class Tree(HTMLParser):
    """Refuses a tag that closes another one; keeps attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))


PAGE = render(
    "A & <b>",
    "Plain <text>",
    section(
        "S <1>",
        table(["run", "top-1 (%)", "<note>"], [["<a>", "1.5 ± 0.2", "x"], ["b", "", Html("<em>y</em>")]], 'cap "tion"'),
        grid(figure(b"bytes", 'alt "text"', "caption <c>"), figure(b"more", "other")),
        note("n & n"),
        details("more <d>", items("one", "<two>")),
    ),
)


def test_the_page_is_well_formed_and_names_its_language_and_viewport():
    tree = Tree(PAGE)
    attributes = dict(tree.tags)
    assert attributes["html"] == {"lang": "en"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tree.tags
    assert ("title", "A & <b>") in tree.text
    assert not {"script", "link", "b", "a", "two"} & {tag for tag, _ in tree.tags}


def test_plain_text_is_escaped_and_html_is_kept():
    tree = Tree(PAGE)
    for tag, text in [("p", "Plain <text>"), ("h2", "S <1>"), ("th", "<a>"), ("th", "<note>"), ("li", "<two>")]:
        assert (tag, text) in tree.text
    assert ("em", "y") in tree.text
    assert {attrs["alt"] for tag, attrs in tree.tags if tag == "img"} == {'alt "text"', "other"}


def test_figures_are_inside_the_page():
    (first, second) = (attrs["src"] for tag, attrs in Tree(PAGE).tags if tag == "img")
    assert base64.b64decode(first.removeprefix("data:image/png;base64,")) == b"bytes"
    assert base64.b64decode(second.removeprefix("data:image/png;base64,")) == b"more"
    assert not re.findall(r"https?://|@import|url\(", PAGE)


def test_columns_of_numbers_are_aligned_right_and_a_row_begins_with_its_name():
    cells = [(tag, attrs.get("class"), attrs.get("scope")) for tag, attrs in Tree(PAGE).tags if tag in ("th", "td")]
    assert cells[:3] == [("th", None, "col"), ("th", "n", "col"), ("th", "s", "col")]
    assert cells[3:6] == [("th", None, "row"), ("td", "n", None), ("td", "s", None)]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [(["x1.5 [1, 2]", ""], "n"), (["ENC, eq. 22", "1.5"], "s"), (["a sentence that goes on and on", "1"], None)],
)
def test_a_column_breaks_into_lines_if_it_holds_long_texts(cells, kind):
    page = render("A", table(["run", "what"], [["a", cell] for cell in cells]))
    assert {attrs.get("class") for tag, attrs in Tree(page).tags if tag == "td"} == {kind}


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["1", "2", "3"]])


def test_save_makes_the_folder_and_writes_utf8(tmp_path):
    page.save_page(PAGE, tmp_path / "x" / "page.html")
    assert (tmp_path / "x" / "page.html").read_bytes() == PAGE.encode("utf-8")
