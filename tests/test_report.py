"""The report reads what real runs wrote, and the page needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from helpers import digits_config, scalars, train

from enc_plugin.report import config_differences, load_run, summary, write_report


@pytest.fixture(scope="module")
def work_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("resnet8_1xb64", "resnet8_enc-ws_1xb64"):
        train(digits_config(root / name, name, epochs=2))
    return [root / "resnet8_1xb64", root / "resnet8_enc-ws_1xb64"]


def test_scalars_are_read_by_epoch(work_dirs):
    run = load_run(work_dirs[1], "ENC")
    logged = scalars(work_dirs[1])
    accuracies = [(line["step"], line["accuracy/top1"]) for line in logged if "accuracy/top1" in line]
    assert run.scalars["accuracy/top1"] == accuracies
    assert [epoch for epoch, _ in accuracies] == [1, 2]
    assert [epoch for epoch, _ in run.scalars["loss"]] == [1, 2]
    assert [value for _, value in run.scalars["enc/layers"]] == [10, 10]


def test_the_table_has_a_row_a_run_and_says_what_only_one_logged(work_dirs):
    runs = [load_run(work_dir) for work_dir in work_dirs]
    head, rows = summary(runs)
    plain, enc = (dict(zip(head, row, strict=True)) for row in rows)
    assert (plain["ENC layers"], enc["ENC layers"]) == ("", "10")
    assert float(enc["top-1 (%)"]) == pytest.approx(runs[1].scalars["accuracy/top1"][-1][1], abs=0.01)
    assert float(enc["deviation from alpha"]) < 1e-5


def test_settings_that_differ_are_shown_and_no_others(work_dirs):
    rows = config_differences([load_run(work_dir) for work_dir in work_dirs])
    assert rows == [["model.type", "'ImageClassifier'", "'ENCImageClassifier'"]]


def test_the_page_is_whole_and_loads_nothing(work_dirs, tmp_path):
    table = write_report(work_dirs, tmp_path / "pages" / "report.html", ["plain", "<ENC>"])
    page = (tmp_path / "pages" / "report.html").read_text()
    assert "<ENC>" in table
    assert "&lt;ENC&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2  # accuracy and loss
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    HTMLParser().feed(page)
    assert page.count("<table>") == page.count("</table>") == 2


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder that tools/train.py wrote to"):
        load_run(tmp_path)


def test_names_and_work_dirs_must_match(work_dirs, tmp_path):
    with pytest.raises(ValueError, match="names: expected one name a work dir, at least one; got 1 for 2"):
        write_report(work_dirs, tmp_path / "report.html", ["one"])
