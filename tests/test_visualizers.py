"""Every visualizer backend receives the same scalars at the same steps: one run, read back from what each has written.

Weights & Biases and MLflow run where they are installed: ``make test-ecosystem``.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import digits_config, train

Curves = dict[str, list[tuple[int, float]]]
BACKENDS = {
    "tensorboard": dict(type="TensorboardVisBackend"),
    "wandb": dict(type="ENCWandbVisBackend", init_kwargs=dict(mode="offline", project="enc")),
    "mlflow": dict(type="MLflowVisBackend"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Curves]:
    """Folder that the backends wrote to in a run of two epochs of three iterations, and ``scalars.json``'s curves."""
    work_dir = tmp_path_factory.mktemp("run")
    cfg = digits_config(work_dir, epochs=2, default_hooks__logger__interval=3)
    cfg.custom_hooks = [dict(type="GBRHook", num_samples=32), dict(type="FGSMHook", num_samples=32, eps=(1, 4))]
    cfg.custom_hooks += [dict(type="ENCMonitorHook", interval=2)]
    installed = [settings for name, settings in BACKENDS.items() if find_spec(name)]
    cfg.visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend"), *installed])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("WANDB_SILENT", "true")
        train(cfg)
    folder = next(work_dir.glob("*/vis_data"))
    curves: Curves = defaultdict(list)
    for line in (folder / "scalars.json").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            curves[name].append((step, value))
    return folder, dict(curves)


def assert_same(curves: Curves, expected: Curves, rel: float) -> None:
    assert curves.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        for (_, value), (_, wanted) in zip(curves[name], points, strict=True):
            assert value == pytest.approx(wanted, rel=rel), name


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Records of an offline run's file: LevelDB's log format, behind a header of seven bytes."""
    block, header = 32768, struct.Struct("<IHB")
    position, record = 7, b""
    while position + header.size <= len(content):
        if block - position % block < header.size:  # the rest of a block is padding
            position += block - position % block
            continue
        _, length, kind = header.unpack_from(content, position)
        position += header.size
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_local_json_has_epochs_for_what_epochs_log_and_iterations_for_training(run):
    steps = {name: [step for step, _ in points] for name, points in run[1].items()}
    assert steps["loss"] == steps["lr"] == [3, 6]
    for name in ("gbr/logits", "gbr/logits_sem", "gbr/seconds"):
        assert steps[name] == [0, 1, 2]
    for name in ("fgsm/top1_clean", "fgsm/top1_eps1", "fgsm/top1_eps4", "fgsm/zero_grad", "accuracy/top1"):
        assert steps[name] == [1, 2]
    assert steps["enc/layers"] == steps["enc/max_deviation"] == [0, 2]
    assert steps["enc_monitor/norm/median"] == steps["enc_monitor/effective_lr/max"] == [2, 4, 6]
    assert all(math.isfinite(value) for points in run[1].values() for _, value in points)


def test_tensorboard_has_the_same_scalars_at_the_same_steps(run):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, expected = run
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert_same(curves, expected, rel=1e-6)  # float32


def test_wandb_has_the_same_scalars_and_their_step_as_the_axis(run):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    folder, expected = run
    curves, axes = defaultdict(list), {}
    for data in leveldb_log(next(folder.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("metric") and record.metric.step_metric:
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                curves[name].append((row["step"], value))
    assert axes["*"] == "step"
    assert_same(curves, expected, rel=1e-12)


def test_mlflow_has_the_same_scalars_at_the_same_steps(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, expected = run
    client = mlflow.MlflowClient(tracking_uri=f"file://{folder}")
    (found,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    curves = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    assert_same(curves, expected, rel=1e-12)
