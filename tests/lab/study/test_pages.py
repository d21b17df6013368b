"""The study's pages follow from the committed results, byte for byte, and stand on their own."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser

import pytest
from helpers import ROOT, SCIPY

from lab import RESULTS
from lab.study import CELLS, load_grid, write_study
from lab.study.answer import headlines, summary_table
from lab.study.grid import cell_efolds
from lab.study.pages import BEGIN, END
from lab.study.results import load_results
from lab.study.sections import claim_sections

STUDY = RESULTS / "study"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The pages, written again from the committed grid and results by the command line."""
    root = tmp_path_factory.mktemp("again")
    folder = root / STUDY.relative_to(ROOT)
    shutil.copytree(STUDY / "runs", folder / "runs")
    shutil.copy(ROOT / "README.md", root)
    with pytest.MonkeyPatch.context() as patch:
        options = ["--pages", "--results", str(folder), "--readme", str(root / "README.md")]
        patch.setattr(sys, "argv", ["lab.study", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lab.study", run_name="__main__")
    assert not end.value.code
    return folder


# An older one ends with another last digit of a p-value.
@pytest.mark.skipif(SCIPY < (1, 17), reason="the pages are written with SciPy 1.17 or later")
@pytest.mark.parametrize("name", ["README.md", "figures.json", "report.html"])
def test_committed_pages_follow_from_the_committed_results(written, name):
    texts = [(folder / name).read_text() for folder in (written, STUDY)]
    # Pixels depend on matplotlib's version; what they show is in figures.json.
    again, committed = (re.sub(r"data:image/webp;base64,[^\"]*", "", text) for text in texts)
    assert again == committed


def test_the_readme_states_the_verdicts_of_the_committed_results(written):
    assert (written.parents[2] / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_the_documentation_states_the_arenas_and_how_much_decay_acts_in_each():
    grid, page = load_grid(CELLS), (ROOT / "docs" / "results.md").read_text()
    stated = dict(re.findall(r"^\| (\w+) \| .* \| ([\d.]+) \|$", page, re.M))
    assert stated == {name: f"{cell_efolds(cells[0]):.2g}" for name, cells in grid.cells.items()}


def test_an_arena_that_asks_again_has_a_column_on_the_page_alone():
    found = load_results(load_grid(CELLS), STUDY / "runs")
    parts = claim_sections(found)
    assert "g5" in " ".join(summary_table(found, parts)[0])
    head, _, *rows = headlines(found, parts).splitlines()
    assert "g5" not in head
    assert {row.count(" | ") for row in rows} == {head.count(" | ")}


def test_a_result_is_one_so_far_while_runs_are_missing(tmp_path):
    shutil.copytree(STUDY / "runs" / "digits", tmp_path / "digits")

    def head_and_row():
        found = load_results(load_grid(CELLS), tmp_path)
        head, _, row, *_ = headlines(found, claim_sections(found)).splitlines()
        assert row.startswith("| ENC raises")
        return head, row

    head, row = head_and_row()
    assert row.endswith("**absent** -0.06 [-0.57, +0.45] |")
    assert "| not run yet |" in row
    assert head.endswith("| full so far | digits |")
    (tmp_path / "digits" / "wn-seed4.json").unlink()
    assert head_and_row() == (head.replace("digits |", "digits so far |"), row)


def test_the_page_opens_with_the_table_one_figure_and_the_contents():
    blocks = (STUDY / "README.md").read_text().split("\n\n")
    assert blocks[1].startswith("| claim | paper |")
    assert blocks[1].splitlines()[-1].startswith("| Not tested | SE, ResNeXt")
    assert blocks[2].startswith("Each cell has one word")
    assert blocks[4].startswith("![Top-1 accuracy of every cell")
    assert blocks[5] == f"*{blocks[4][2:].split('](')[0]}*"
    assert blocks[6] == "Contents:"
    assert blocks[7].startswith("- [ENC raises the accuracy](#enc-raises-the-accuracy)")


def test_every_figure_is_there_and_no_other(written):
    names = {figure["name"] for figure in json.loads((STUDY / "figures.json").read_text())}
    for folder in (written, STUDY):
        assert {path.stem for path in (folder / "figures").glob("*.png")} == names
    assert all((STUDY / "figures" / f"{name}.png").stat().st_size < 200_000 for name in names)


def test_every_result_is_on_the_page_and_carries_commit_and_seed():
    page = (STUDY / "README.md").read_text()
    for path in STUDY.glob("runs/*/*.json"):
        result = json.loads(path.read_text())
        assert f"[{result['id']}](runs/{result['id']}.json)" in page
        assert path == STUDY / "runs" / f"{result['id']}.json"
        assert re.fullmatch(r"[0-9a-f]{7,12}", result["provenance"]["commit"]), path  # a clean checkout
        assert isinstance(result["seed"], int)


def test_every_finished_run_is_measured_to_its_end():
    for path in STUDY.glob("runs/*/*.json"):
        result = json.loads(path.read_text())
        if result["status"] == "finished":
            assert result["by_epoch"]["accuracy/top1"][-1] == [result["epochs"], result["final"]["top1"]], path
            measured = [x for x, _ in result["by_epoch"]["gbr/logits"]]
            every = next((h["interval"] for h in result["overrides"].get("custom_hooks", [])), 1)
            assert measured == list(range(0, result["epochs"] + 1, every)), path
            assert sum(key.startswith("fgsm/top1_eps") for key in result["final"]) == 4, path
            assert result["final"]["test_top1"] == pytest.approx(result["final"]["top1"], abs=0.05), path


def test_links_of_the_page_lead_somewhere():
    page = (STUDY / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", page, flags=re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert target in anchors or (STUDY / target).exists(), target


def test_the_html_page_needs_no_other_file():
    page = (STUDY / "report.html").read_text()
    assert set(re.findall(r'src="([^",]*,)', page)) == {"data:image/webp;base64,"}
    links = re.findall(r'href="([^"]*)"', page)
    assert links
    assert set(links) == {f"#{name}" for name in re.findall(r'<h2 id="([^"]*)"', page)}
    assert len(page) < 1_000_000
    HTMLParser().feed(page)


def test_a_readme_without_the_markers_is_refused_before_anything_is_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# no markers\n")
    with pytest.raises(ValueError, match="between which the verdicts go"):
        write_study(tmp_path / "study", readme)
    assert readme.read_text() == "# no markers\n"
    assert not (tmp_path / "study").exists()


def test_only_the_lines_between_the_markers_change(tmp_path):
    readme, study = tmp_path / "README.md", tmp_path / "study"
    study.mkdir()  # without any run
    readme.write_text(f"before\n{BEGIN}\nwritten earlier\n{END}\nafter\n")
    write_study(study, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "written earlier" not in text
    write_study(study, readme)
    assert readme.read_text() == text
