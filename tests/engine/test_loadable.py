"""What goes into a checkpoint can be read back, by this numpy and the other one, or is refused when it is saved."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from helpers import build_runner, digits_config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from enc_plugin.checkpoint import read_checkpoint
from enc_plugin.engine.loadable import make_loadable


class Colour(enum.Enum):
    RED = 3


class Share(float):
    pass


Point = collections.namedtuple("Point", "x y")


def roundtrip(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.bool_(True), True),
        (np.complex64(1j), 1j),
        (np.str_("a"), "a"),
        (np.datetime64("2020-01-02"), "2020-01-02"),
        (np.array([1, "a", None], dtype=object), [1, "a", None]),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), [(1, 2.0)]),
        (pathlib.PurePosixPath("/data"), "/data"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (Colour.RED, 3),
        (Share(0.5), 0.5),
        (Point(1, np.int64(2)), (1, 2)),
        (collections.defaultdict(list, {np.int64(3): [np.float16(4)]}), {3: [4.0]}),
        (collections.Counter("aab"), collections.Counter("aab")),
        ({"a": frozenset([1]), "b": torch.Size([2])}, {"a": {1}, "b": torch.Size([2])}),
    ],
)
def test_values_become_what_loads(value, expected):
    loaded = roundtrip(make_loadable(value, "meta"))
    assert loaded == expected
    assert type(loaded) is type(expected)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "i1", "u2", "i4", "?", "U3", "M8[D]"])
def test_arrays_of_numbers_and_texts_stay_arrays(dtype):
    array = np.array([0, 1, 2], dtype="i8").astype(dtype)
    loaded = roundtrip(make_loadable(array, "meta"))
    assert loaded.dtype == array.dtype
    assert np.array_equal(loaded, array)


def test_state_dicts_keep_their_order_and_metadata():
    state = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict()
    loaded = make_loadable({"state_dict": state}, "checkpoint")["state_dict"]
    assert list(loaded) == list(state)
    assert loaded._metadata == state._metadata


@pytest.mark.parametrize("value", [object(), len, np.random.default_rng()])
def test_other_objects_are_refused_by_their_place(value):
    with pytest.raises(ValueError, match=r"checkpoint: meta\['a'\]\[1\] is a .*, which torch.load.* refuses"):
        make_loadable({"a": [0, value]}, "meta")


def test_checkpoints_of_the_other_numpy_load(tmp_path):
    saved = {"state_dict": {"x": torch.ones(2)}, "meta": {"a": np.arange(3.0), "b": np.float64(2)}}
    torch.save(saved, tmp_path / "own.pth")
    own, other = (
        (b"numpy._core", b"numpy.core") if int(np.__version__.split(".")[0]) > 1 else (b"numpy.core", b"numpy._core")
    )
    with zipfile.ZipFile(tmp_path / "own.pth") as old, zipfile.ZipFile(tmp_path / "other.pth", "w") as new:
        for record in old.namelist():
            content = old.read(record)
            assert own in content or not record.endswith("data.pkl")
            new.writestr(record, content.replace(own, other) if record.endswith("data.pkl") else content)
    _, rest = read_checkpoint(tmp_path / "other.pth")
    assert np.array_equal(rest["meta"]["a"], np.arange(3.0))
    assert rest["meta"]["b"] == 2


@METRICS.register_module(force=True)
class _Score(BaseMetric):
    """A metric that is not a plain number."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def process(self, data_batch, data_samples):
        self.results.append(1.0)

    def compute_metrics(self, results):
        return {"score": self.score}


def test_a_best_score_of_numpy_is_saved_as_a_plain_number(tmp_path):
    cfg = digits_config(
        tmp_path, default_hooks__checkpoint__save_best="score", default_hooks__checkpoint__rule="greater"
    )
    cfg.val_evaluator = [dict(type="_Score", score=np.float32(0.75))]
    build_runner(cfg).train()
    _, rest = read_checkpoint(next(tmp_path.glob("best_score_*.pth")))
    best = rest["message_hub"]["runtime_info"]["best_score"]
    assert (type(best), best) == (float, 0.75)


def test_a_dataset_whose_metainfo_could_not_be_loaded_is_refused_before_training(tmp_path):
    runner = build_runner(digits_config(tmp_path))
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.train_dataloader.dataset._metainfo["palette"] = object()
    with pytest.raises(ValueError, match=r"the dataset's metainfo\['palette'\] is a builtins.object"):
        runner.call_hook("before_train")
