"""The report reads what real runs wrote, and the page needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from browser import CHROMIUM, browser
from helpers import digits_config, scalars, train
from scipy import stats

from enc_plugin.engine.monitor_hook import STEP
from enc_plugin.reports.compare import write_report
from enc_plugin.reports.curves import _series, kind_of, limits_without_first
from enc_plugin.reports.norms import read_norms
from enc_plugin.reports.plot import Series
from enc_plugin.reports.runs import load_run
from enc_plugin.reports.settings import config_differences
from enc_plugin.reports.summary import summary


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
    assert len(sources) == 4  # accuracy, loss, learning rate, norms of the layers
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    HTMLParser().feed(page)
    assert page.count("<table>") == page.count("</table>") == 6  # summary, origin, slack, norms, cost, settings


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder that tools/train.py wrote to"):
        load_run(tmp_path)


def test_names_and_work_dirs_must_match(work_dirs, tmp_path):
    with pytest.raises(ValueError, match="names: expected .* one name for each, got 2 work dirs and 1 names"):
        write_report(work_dirs, tmp_path / "report.html", ["one"])


def write_log(work_dir, records, time="20260101_000000", config="train_cfg = dict(by_epoch=True, max_epochs=4)\n"):
    """A work dir with these lines, as mmengine writes them."""
    folder = work_dir / time / "vis_data"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(config)
    (folder / "scalars.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    return work_dir


def epoch(number, loss, accuracy, length=10):
    """The lines of an epoch."""
    line = {"lr": 0.1, "data_time": 0.1, "loss": loss, "time": 0.5, "epoch": number, "iter": number * length}
    val = {"accuracy/top1": accuracy, "data_time": 0.1, "time": 0.2, "step": number}
    return [line | {"memory": 100 * number, "step": number * length}, val]


def test_resumed_segments_are_joined_and_what_was_done_twice_counts_once(tmp_path):
    write_log(tmp_path, [*epoch(1, 3.0, 10.0), *epoch(2, 2.0, 20.0), *epoch(3, 9.0, 1.0)])
    resumed = "resume = True\ntrain_cfg = dict(by_epoch=True, max_epochs=4)\n"
    write_log(tmp_path, [*epoch(3, 1.0, 30.0), *epoch(4, 0.5, 40.0)], "20260102_000000", resumed)
    run = load_run(tmp_path)
    assert run.scalars["loss"] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert run.scalars["accuracy/top1"] == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert (run.iterations, run.progress, run.notes) == (40, "4", ["resumed once"])
    write_log(tmp_path, epoch(1, 7.0, 70.0), "20260103_000000")
    run = load_run(tmp_path)
    assert run.scalars["loss"] == [(1, 7.0)]
    assert (run.progress, run.notes) == ("1 of 4", ["2 earlier starts in the same folder left out"])


def test_a_validation_that_a_resumed_run_only_makes_up_for_counts(tmp_path):
    whole = [*epoch(1, 3.0, 10.0), *epoch(2, 2.0, 20.0)]
    config = "train_cfg = dict(by_epoch=True, max_epochs=2)\n"
    resumed = "resume = True\n" + config
    write_log(tmp_path, whole[:-1], config=config)
    write_log(tmp_path, [whole[-1], {"fgsm/top1_eps8": 5.0, "step": 2}], "20260102_000000", resumed)
    write_log(tmp_path, [{"enc/layers": 9, "step": 2}], "20260103_000000", resumed)  # all was done
    run = load_run(tmp_path)
    assert run.scalars["accuracy/top1"] == [(1, 10.0), (2, 20.0)]
    assert run.scalars["fgsm/top1_eps8"] == [(2, 5.0)]
    assert (run.iterations, run.progress, run.notes) == (20, "2", ["resumed once"])


def test_a_validation_by_iterations_that_a_resumed_run_starts_with_is_where_it_resumed(tmp_path):
    lines = [{"loss": 1.0, "time": 0.5, "data_time": 0.1, "iter": i, "step": i} for i in (10, 20, 30, 40)]
    val = {"accuracy/top1": 50.0, "time": 0.1, "data_time": 0.1, "step": 0}
    config = "train_cfg = dict(by_epoch=False, max_iters=40)\n"
    write_log(tmp_path, lines[:2], config=config)
    write_log(tmp_path, [val, *lines[2:]], "20260102_000000", "resume = True\n" + config)
    assert load_run(tmp_path).scalars["accuracy/top1"] == [(20, 50.0)]
    write_log(tmp_path, [val], "20260103_000000", "resume = True\n" + config)
    run = load_run(tmp_path)
    assert run.scalars["accuracy/top1"] == [(20, 50.0), (40, 50.0)]
    assert len(run.scalars["loss"]) == 4


def test_damaged_lines_and_values_that_are_not_finite_are_told_and_the_rest_is_drawn(tmp_path):
    write_log(tmp_path, [*epoch(1, 3.0, 10.0), *epoch(2, math.nan, 20.0)])
    log = next(tmp_path.glob("*/vis_data/scalars.json"))
    log.write_text(log.read_text() + "{broken\n" + json.dumps(epoch(3, 1.0, 5.0)[0])[:20])
    run = load_run(tmp_path)
    assert [x for x, _ in run.scalars["loss"]] == [1, 2]
    assert run.notes == ["1 damaged lines of the log were left out", "loss is not finite at epoch 2"]
    write_report([tmp_path], tmp_path / "report.html")
    assert "loss is not finite at epoch 2" in (tmp_path / "report.html").read_text()


def test_runs_by_iteration_are_drawn_beside_runs_by_epoch_and_without_validation(tmp_path):
    config = "train_cfg = dict(by_epoch=False, max_iters=50)\n"
    lines = [{"loss": 1.0, "lr": 0.1, "time": 0.5, "data_time": 0.1, "iter": i, "step": i} for i in (10, 20, 30)]
    lines.insert(2, {"accuracy/top1": 50.0, "time": 0.1, "data_time": 0.1, "step": 0})
    by_iteration = load_run(write_log(tmp_path / "a", lines, config=config))
    assert by_iteration.progress == "30 of 50"
    assert by_iteration.scalars["accuracy/top1"] == [(20, 50.0)]
    write_log(tmp_path / "b", [line for line in epoch(1, 3.0, 10.0) if "loss" in line])
    table = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html")
    assert table.startswith("run  iterations")


def test_a_checkpoint_that_cannot_be_read_is_a_reason_on_the_page(tmp_path):
    write_log(tmp_path, epoch(1, 3.0, 10.0), config="model = dict(type='NoSuchModel')\n")
    (tmp_path / "epoch_1.pth").write_bytes(b"not a checkpoint")
    write_report([tmp_path], tmp_path / "report.html")
    assert re.search(r"epoch_1\.pth: \w+Error", (tmp_path / "report.html").read_text())


def test_a_run_is_read_with_its_own_config_beside_later_tests_and_runs_in_its_folder(work_dirs, tmp_path):
    outer = shutil.copytree(work_dirs[0], tmp_path / "run")
    shutil.copytree(work_dirs[1], outer / "tuned")
    tested = outer / "29990101_000000" / "vis_data" / "config.py"
    tested.parent.mkdir(parents=True)
    tested.write_text("model = dict(type='AverageClsScoreTTA')\n")
    run = load_run(outer)
    run.count_validation_samples()
    assert run.val_samples == 64
    norms = read_norms(run)
    assert norms.reason == ""
    assert [row.type for row in norms.table] == [row.type for row in read_norms(load_run(work_dirs[0])).table]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page_whole_at_desktop_and_phone_width(work_dirs, tmp_path):
    many = [write_log(tmp_path / f"a-run-with-a-long-name-{i}", epoch(1, i, i)) for i in range(10)]
    write_report([*work_dirs, *many], tmp_path / "report.html")
    with browser() as tab:
        for width, dark in ((1200, False), (360, False), (360, True)):
            tab.open(tmp_path / "report.html", width, dark=dark)
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            sizes = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.alt])")
            assert len(sizes) >= 4
            assert all(
                complete and natural > 0 and 0 < shown <= width and alt for complete, natural, shown, alt in sizes
            )
            assert tab.evaluate("document.title") == "ENC report"
        assert tab.complaints == []


def test_the_monitors_scalars_stand_at_their_iteration_and_are_drawn_by_layer_and_over_training(tmp_path):
    keys = [f"{key}/{bound}" for key in STEP for bound in ("min", "median", "max")]
    keys += [f"{layer}/{key}" for layer in ("stem", "head.fc") for key in STEP]
    monitor = {f"enc_monitor/{key}": float(i + 1) for i, key in enumerate(keys)}
    write_log(tmp_path, [monitor | {"step": 5}, *epoch(1, 3.0, 10.0), monitor | {"step": 15}, *epoch(2, 2.0, 20.0)])
    run = load_run(tmp_path)
    assert run.scalars["enc_monitor/stem/norm"] == [(0.5, 13.0), (1.5, 13.0)]
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.findall('alt="(.*), layer by layer"', page) == [title for title, _ in STEP.values()]
    assert 'alt="Norm of the free weights W over training' in page


EMA = "train_cfg = dict(by_epoch=True, max_epochs=2)\ncustom_hooks = [dict(type='EMAHook'), dict(type='GBRHook')]\n"


def test_a_row_names_the_weights_that_its_values_are_of_and_where_a_value_is_older(tmp_path):
    unit = "logits² per squared standard deviation of the input"
    told = {"weights": "validated", "samples": "48 of 192 training samples", "unit": unit}
    measured = {"gbr/logits": 2.0, "gbr/logits_sem": 0.1, "gbr/averaged": 1.0, "gbr/seconds": 3.0, "step": 1}
    averaged = write_log(tmp_path / "averaged", [*epoch(1, 3.0, 10.0), measured, *epoch(2, 2.0, 20.0)], config=EMA)
    (averaged / "measurements.json").write_text(json.dumps({"gbr/logits": told, "gbr/logits_sem": told}))
    now = measured | {"gbr/averaged": 0.0, "step": 2, "gbr/logits_pixel_seconds": 4.0}
    plain = write_log(tmp_path / "plain", [*epoch(1, 3.0, 10.0), *epoch(2, 2.0, 20.0), now])
    head, rows = summary([load_run(averaged), load_run(plain)])
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert [cell["weights"] for cell in cells] == ["averaged", "in training"]
    assert [cell["GBR logits"] for cell in cells] == ["2 ± 0.1 (at 1)", "2 ± 0.1"]
    assert [name for name in head if name.startswith("GBR")] == ["GBR logits"]
    write_report([averaged, plain], tmp_path / "report.html", norms=False)
    page = (tmp_path / "report.html").read_text()
    for text in ("validated (averaged)", told["samples"], unit):
        assert text in page
    assert ">7.0<" in page  # seconds of both measurements of the second run


def test_measurements_in_different_units_are_not_to_be_compared(tmp_path):
    work_dirs = []
    for name, unit in (("a", "logits² per squared gray level"), ("b", "logits² per squared standard deviation")):
        line = {"gbr/logits": 2.0, "gbr/logits_sem": 0.1, "gbr/averaged": 0.0, "step": 1}
        work_dirs.append(write_log(tmp_path / name, [*epoch(1, 3.0, 10.0), line]))
        told = {"weights": "validated", "samples": "8 of 9 training samples", "unit": unit}
        (work_dirs[-1] / "measurements.json").write_text(json.dumps({"gbr/logits": told}))
    write_report(work_dirs, tmp_path / "report.html", norms=False)
    page = (tmp_path / "report.html").read_text()
    assert "gbr/logits differs between runs (logits² per squared gray level; logits² per squared standard" in page


def test_the_page_says_where_each_run_comes_from(work_dirs, tmp_path):
    write_report(work_dirs, tmp_path / "report.html", norms=False)
    page = (tmp_path / "report.html").read_text()
    origin = load_run(work_dirs[0]).origin
    assert origin["seed"] == str(load_run(work_dirs[0]).config["randomness"]["seed"])
    assert origin["torch"] == torch.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", origin["started"])
    for text in (*origin, *origin.values()):
        assert f">{text}<" in page


def test_shares_of_a_known_number_of_samples_have_wilson_bands(work_dirs, tmp_path):
    run = load_run(work_dirs[0])
    assert one_series(run, "accuracy/top1").lower is None  # nobody has said how many images there are
    run.count_validation_samples()
    assert run.val_samples == 64
    series = one_series(run, "accuracy/top1")
    value = run.last("accuracy/top1")
    expected = stats.binomtest(round(value * 64 / 100), 64).proportion_ci(0.95, method="wilson")
    assert (series.lower[-1], series.upper[-1]) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert one_series(run, "loss").lower is None

    line = {"fgsm/top1_eps8": 50.0, "fgsm/averaged": 0.0, "step": 1}
    write_log(tmp_path, [*epoch(1, 3.0, 10.0), line])
    told = {"weights": "validated", "samples": "100 of 10000 validation samples", "unit": "%"}
    (tmp_path / "measurements.json").write_text(json.dumps({"fgsm/top1_eps8": told}))
    assert one_series(load_run(tmp_path), "fgsm/top1_eps8").upper[0] == pytest.approx(59.6, abs=0.1)


def one_series(run, key):
    return _series(run, key, kind_of(key), 1)


def test_a_start_that_would_take_most_of_a_logarithmic_axis_is_left_off_it_and_told(tmp_path):
    gbr = [{"gbr/logits": value, "gbr/logits_sem": 0.1, "step": i} for i, value in enumerate((1e-7, 20.0, 30.0))]
    write_log(tmp_path, [gbr[0], *epoch(1, 3.0, 10.0), gbr[1], *epoch(2, 2.0, 20.0), gbr[2]])
    write_report([tmp_path], tmp_path / "report.html", ["mine"], norms=False)
    assert "First values beyond the axis: mine 1e-07." in (tmp_path / "report.html").read_text()
    assert limits_without_first([Series("a", [0, 1, 2], [10.0, 20.0, 30.0])]) == (None, "")
    assert limits_without_first([Series("a", [0, 1, 2], [1e-7, 20.0, 30.0])])[0] == (10.0, 60.0)


def test_values_beyond_the_limit_that_a_hook_declares_are_pointed_out(tmp_path):
    for name, share in (("good", 0.0), ("masked", 0.5)):
        line = {"fgsm/top1_eps8": 5.0, "fgsm/zero_grad": share, "step": 1}
        write_log(tmp_path / name, [*epoch(1, 3.0, 10.0), line])
    write_report([tmp_path / "good", tmp_path / "masked"], tmp_path / "report.html", norms=False)
    page = (tmp_path / "report.html").read_text()
    assert re.search(r'class="note">masked: More than 1 % of the images have an all-zero gradient', page)


def test_plain_runs_have_the_first_colours_in_whatever_order_they_are_given(work_dirs, tmp_path):
    write_report(work_dirs[::-1], tmp_path / "report.html", norms=False)
    page = (tmp_path / "report.html").read_text()
    assert "Training loss over training, by epoch: resnet8_1xb64, resnet8_enc-ws_1xb64" in page
