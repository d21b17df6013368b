"""Real runs on bad input: each ends before its first step, or where it went wrong, with a message that helps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, build_runner, digits_config, train
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmpretrain.datasets import CustomDataset
from PIL import Image
from torch import nn

from enc_plugin import ENCConv2d, ENCLinear, to_enc
from enc_plugin.engine.diagnosis import find_cause
from enc_plugin.engine.preflight import check_work_dir


@HOOKS.register_module()
class _Poison(Hook):
    """Makes one value of the run NaN at the given epoch (from 1), in the way that is asked for."""

    def __init__(self, what: str, epoch: int):
        self.what, self.epoch = what, epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch + 1 != self.epoch:
            return
        fc = runner.model.head.fc
        if self.what == "batch":
            data_batch["inputs"] = [x.float() for x in data_batch["inputs"]]
            data_batch["inputs"][2][0, 0, 0] = float("nan")
        elif self.what == "weight":
            fc.weight.data[0, 0] = float("inf")
        elif self.what == "constant":
            fc.weight.data[1] = 0.5
        elif self.what == "forward":
            runner.model.backbone.layer2[0].bn1.weight.data[0] = 3e38
            runner.model.backbone.layer2[0].bn1.bias.data[0] = 3e38
        elif self.what == "gradient" and batch_idx == 0:
            fc.bias.register_hook(lambda grad: grad * float("nan"))


CAUSES = {
    "batch": "the batch holds NaN or Inf (number 2 of the batch)",
    "weight": "1 weights hold NaN or Inf: 'head.fc.weight'",
    "constant": "layer 'head.fc': 1 of its 10 rows are constant (0 / 0)",
    "forward": "the first output that is not finite is that of 'backbone.layer2.0",
    "gradient": "only gradients are not finite, and the one nearest to the loss is that of 'head.fc.bias'",
}


@pytest.mark.parametrize("what", CAUSES)
def test_a_run_that_diverges_after_an_epoch_stops_and_names_layer_and_checkpoint(tmp_path, what):
    cfg = digits_config(tmp_path, epochs=2, custom_hooks=[dict(type="_Poison", what=what, epoch=2)])
    with pytest.raises(FloatingPointError) as stopped:
        train(cfg)
    message = str(stopped.value)
    assert "in epoch 2, iteration 4" in message
    assert CAUSES[what] in message
    assert f"the last checkpoint is {tmp_path / 'epoch_1.pth'}" in message
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "epoch_2.pth").exists()


def test_the_optimizer_never_uses_a_gradient_that_is_not_finite(tmp_path):
    cfg = digits_config(tmp_path, epochs=2, custom_hooks=[dict(type="_Poison", what="gradient", epoch=2)])
    runner = build_runner(cfg)
    with pytest.raises(FloatingPointError):
        runner.train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)["state_dict"]
    for name, value in runner.model.named_parameters():
        assert torch.equal(value, saved[name]), name


def test_the_guard_leaves_no_trace_and_can_be_turned_off(tmp_path):
    with_guard = train(digits_config(tmp_path / "with", epochs=2)).model.state_dict()
    without = train(digits_config(tmp_path / "without", epochs=2, default_hooks__enc_guard=None)).model.state_dict()
    assert all(torch.equal(value, without[key]) for key, value in with_guard.items())
    hooks = [dict(type="_Poison", what="gradient", epoch=1)]
    cfg = digits_config(
        tmp_path / "off", custom_hooks=hooks, default_hooks__enc_guard=dict(type="ENCGuardHook", finite=False)
    )
    assert train(cfg).epoch == 1


_IMAGES = torch.zeros(3, 1, 2, 2).index_fill_(0, torch.tensor([1]), float("nan"))
_FILES = [dict(img_path=f"{name}.png") for name in "abc"]


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (dict(inputs=_IMAGES, data_samples=_FILES), "b.png"),
        (dict(inputs=[*_IMAGES], data_samples=_FILES), "b.png"),
        (dict(inputs=[_IMAGES, _IMAGES.nan_to_num()], data_samples=_FILES), "b.png"),
        (dict(inputs=[[*_IMAGES], [*_IMAGES]], data_samples=_FILES), "b.png"),
        (dict(inputs=_IMAGES, labels=torch.zeros(3)), "number 1 of the batch"),
    ],
    ids=["stacked", "a list", "stacked views", "views", "without data_samples"],
)
def test_the_picture_that_is_not_finite_is_named_in_each_form_of_a_batch(batch, named):
    found = find_cause(SimpleNamespace(model=nn.Identity()), batch)
    assert found == f"the batch holds NaN or Inf ({named})"


@pytest.mark.parametrize("saved", ["after an epoch", "after the last iteration", "as the best"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, saved):
    """The step before the checkpoint overflows: no gradient tells of it any more."""
    cfg = digits_config(tmp_path, epochs=1, custom_hooks=[dict(type="_OverflowLast")])
    if saved != "after an epoch":
        last, validated = (4, 3) if saved == "as the best" else (3, 9)
        cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=last, val_interval=validated)
        cfg.param_scheduler = None
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=9, save_best="accuracy/top1")
    with pytest.raises(FloatingPointError, match="a weight or a running statistic is NaN .* in epoch 1, iteration 3;"):
        train(cfg)
    assert not list(tmp_path.glob("*.pth"))


@HOOKS.register_module()
class _OverflowLast(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 2:
            runner.model.head.fc.weight.data[0, 0] = float("inf")


REFUSED = {
    "a last batch of one": (
        dict(train_dataloader__dataset__indices=65),
        "train_dataloader: 65 samples in batches of 64 leave a batch of one, over which 'head.fc' cannot normalise",
    ),
    "batches of one": (
        dict(train_dataloader__batch_size=1),
        "set drop_last=True in train_dataloader, a larger batch_size, or enc=dict(post_norm=False)",
    ),
    "no batch": (
        dict(train_dataloader__batch_size=256, train_dataloader__drop_last=True),
        "batch_size: expected at most 192, the number of samples",
    ),
    "an empty training set": (dict(train_dataloader__dataset__indices=[]), "dataloader: its dataset holds no sample"),
    "an empty validation set": (dict(val_dataloader__dataset__indices=[]), "dataloader: its dataset holds no sample"),
    "an empty set that is not serialised": (
        dict(train_dataloader__dataset__indices=[], train_dataloader__dataset__serialize_data=False),
        "dataset holds no sample|num_samples",
    ),
    "labels beyond the head": (
        dict(model__head__num_classes=5),
        "train_dataloader: expected labels from 0 to 4, because the head has num_classes=5, got 5 (sample 5)",
    ),
    "a head of one class": (
        dict(model__head__num_classes=1, model__head__topk=(1,)),
        "num_classes: expected at least 2, got 1",
    ),
    "val_interval 0": (dict(train_cfg__val_interval=0), "train_cfg.val_interval: expected at least 1, got 0"),
    "max_epochs 0": (dict(train_cfg__max_epochs=0), "train_cfg.max_epochs: expected at least 1, got 0"),
    "max_epochs as text": (dict(train_cfg__max_epochs="2"), "train_cfg.max_epochs: expected an integer of at least 1"),
    "batch_size 0": (dict(train_dataloader__batch_size=0), "batch_size should be a positive integer value"),
    "batch_size as text": (dict(train_dataloader__batch_size="8"), "batch_size should be a positive integer value"),
    "lr as text": (dict(optim_wrapper__optimizer__lr="0.1"), "lr: expected a finite number >= 0, got '0.1'"),
    "lr NaN": (dict(optim_wrapper__optimizer__lr=float("nan")), "lr: expected a finite number >= 0, got nan"),
    "negative decay": (dict(optim_wrapper__optimizer__weight_decay=-1e-4), "weight_decay: expected a finite number"),
    "eps below 0": (dict(optim_wrapper__paramwise_cfg=dict(shift_eps=-1.0)), "shift_eps: expected a finite number"),
    "interval 0": (dict(custom_hooks=[dict(type="GBRHook", interval=0)]), "interval: expected at least 1, got 0"),
    "projections 0": (dict(custom_hooks=[dict(type="GBRHook", projections=0)]), "projections: expected None (exact)"),
    "unknown variant": (dict(model__enc=dict(variant="l2")), "variant: expected one of 'fro'"),
    "another codebase's model": (
        dict(model__type="mmdet.FasterRCNN"),
        "mmdet.FasterRCNN is not in the mmpretrain::model registry",
    ),
    "another codebase's dataset": (
        dict(train_dataloader__dataset__type="CocoDataset"),
        "CocoDataset is not in the mmpretrain::dataset registry",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_work_is_refused_before_its_first_step(tmp_path, case):
    options, message = REFUSED[case]
    steps = []
    cfg = digits_config(tmp_path, **options)

    def run() -> None:
        runner = build_runner(cfg)
        runner.model.register_forward_pre_hook(lambda *_: steps.append(1))
        runner.train()

    with pytest.raises((ValueError, TypeError, KeyError)) as refused:  # KeyError: mmengine's, for unknown types
        run()
    assert any(part in str(refused.value) for part in message.split("|"))
    assert not steps


def test_more_samples_than_there_are_means_all(tmp_path):
    hooks = [dict(type="GBRHook", num_samples=10**6), dict(type="FGSMHook", num_samples=10**6, eps=4)]
    train(digits_config(tmp_path, custom_hooks=hooks))
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "192 different training samples" in log
    assert "64 validation samples" in log


def test_a_dataset_of_one_class_is_warned_of(tmp_path):
    def pictures(folder: Path) -> dict:
        (folder / "only").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / "only" / f"{i}.png")
        pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
        return dict(_delete_=True, type="CustomDataset", data_root=str(folder), with_label=True, pipeline=pipeline)

    assert len(CustomDataset(**{k: v for k, v in pictures(tmp_path / "try").items() if k not in ("_delete_", "type")}))
    train(digits_config(tmp_path / "run", train_dataloader__dataset=pictures(tmp_path / "data")))
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "all 4 samples of train_dataloader are of class 0" in log


@pytest.mark.parametrize("layer", [ENCLinear(4, 3, post_norm=True), ENCConv2d(2, 3, 1, variant="wn", post_norm=True)])
def test_a_post_norm_asks_for_more_than_one_value(layer):
    one = torch.ones(1, 4) if isinstance(layer, ENCLinear) else torch.ones(1, 2, 1, 1)
    with pytest.raises(ValueError, match="input: this ENC.* has a post-norm .*drop_last=True"):
        layer.train()(one)
    assert layer.eval()(one).shape[1] == 3


class TestWorkDir:
    def test_a_file_in_its_place_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        for work_dir in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ValueError, match=f"work_dir: {tmp_path / 'file'} is a file, not a folder"):
                build_runner(digits_config(work_dir))

    def test_a_full_disk_is_refused_before_training(self, small_disk):
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(ValueError, match="work_dir: .* cannot be written to .No space left on device."):
            build_runner(digits_config(small_disk / "run"))

    def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(self, small_disk):
        runner = build_runner(digits_config(small_disk / "run"))
        with pytest.raises(ValueError, match=r"has 0\.\d MB free, and a checkpoint takes about 0\.\d MB"):
            runner.train()

    def test_a_read_only_disk_is_refused(self, small_disk):
        done = subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True)
        if done.returncode:
            pytest.skip("cannot remount here")
        with pytest.raises(ValueError, match="work_dir: .* cannot be written to .Read-only file system."):
            check_work_dir(small_disk / "run")

    @pytest.mark.parametrize("work_dir", [None, 3, ["a"]])
    def test_it_has_to_be_a_path(self, work_dir):
        with pytest.raises(TypeError, match="work_dir: expected a folder's path"):
            check_work_dir(work_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 256 kB: as root, permissions and quotas stop nothing."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here (needs root)")
    yield folder
    os.chdir(ROOT)
    subprocess.run(["umount", "-l", str(folder)], check=True)


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        train(digits_config(folder))
        return folder / "epoch_1.pth"

    def write(self, tmp_path, state_dict: dict) -> str:
        torch.save(dict(state_dict=state_dict, meta={}), tmp_path / "other.pth")
        return str(tmp_path / "other.pth")

    def test_another_codebase_is_refused(self, tmp_path):
        path = self.write(tmp_path, {"bbox_head.weight": torch.ones(3)})
        with pytest.raises(ValueError, match="load_from: nothing of .* fits the model"):
            train(digits_config(tmp_path / "run", load_from=path))

    def test_another_architecture_is_refused(self, checkpoint, tmp_path):
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        wider = {key: torch.cat([value, value]) if value.ndim else value for key, value in saved.items()}
        with pytest.raises(ValueError, match="have the same shape .* is it a checkpoint of another architecture"):
            train(digits_config(tmp_path / "run", load_from=self.write(tmp_path, wider)))

    def test_nan_is_refused(self, checkpoint, tmp_path):
        saved = dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        saved["head.fc.weight"] = saved["head.fc.weight"] * float("nan")
        for mode in ("train", "test"):
            with pytest.raises(ValueError, match=r"load_from: .* holds NaN or Inf in 1 tensors: 'head\.fc\.weight'"):
                getattr(build_runner(digits_config(tmp_path / mode, load_from=self.write(tmp_path, saved))), mode)()

    def test_a_part_may_be_trained_from_but_not_tested(self, checkpoint, tmp_path):
        saved = dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        del saved["backbone.conv1.weight"]
        path = self.write(tmp_path, saved)
        assert train(digits_config(tmp_path / "train", load_from=path)).epoch == 1
        with pytest.raises(ValueError, match=r"lacks 1 tensors of the model \('backbone\.conv1\.weight', \.\.\.\)"):
            build_runner(digits_config(tmp_path / "test", load_from=path)).test()
        assert "accuracy/top1" in build_runner(digits_config(tmp_path / "ok", load_from=str(checkpoint))).test()

    def test_labels_of_the_test_set_are_looked_at_too(self, tmp_path):
        with pytest.raises(ValueError, match="test_dataloader: expected labels from 0 to 4"):
            build_runner(digits_config(tmp_path, model__head__num_classes=5)).test()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_conversion(bad):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight.data[0, 0] = bad
    with pytest.raises(ValueError, match="layer '1': its weight holds NaN or Inf"):
        to_enc(model)
