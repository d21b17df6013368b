"""Runs of mmengine and mmpretrain on the device: the digits, their hooks, exact resume, the guard, nccl, the demo."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="OpenMMLab is not installed")
pytest.importorskip("mmpretrain", reason="OpenMMLab is not installed")

from exactness import StopHook, Stopped, assert_same, assert_same_run, end_of  # noqa: E402, F401
from helpers import ROOT, build_runner, digits_config, dist_train, run_command, scalars, train  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.registry import HOOKS, MODELS  # noqa: E402
from torch import nn  # noqa: E402

from enc_plugin import audit  # noqa: E402
from enc_plugin.models import ResNetCIFAR6n  # noqa: E402
from lab.provenance import provenance  # noqa: E402

DETERMINISTIC = dict(randomness=dict(seed=0, deterministic=True))
AMP = {"optim_wrapper__type": "AmpOptimWrapper"}
RUNS = {
    "float32": {},
    "float16 and a scaler": AMP | {"optim_wrapper__loss_scale": "dynamic"},
    "bfloat16": AMP | {"optim_wrapper__dtype": "bfloat16"},
    "fused": AMP | {"optim_wrapper__loss_scale": "dynamic", "optim_wrapper__optimizer__fused": True},
    "AdamW": {"optim_wrapper__optimizer": dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05)},
    "accumulated and clipped": {
        "optim_wrapper__accumulative_counts": 2,
        "optim_wrapper__clip_grad": dict(max_norm=1.0),
    },
    "compiled": dict(compile=True),
    "penalty on the GBR": dict(model__gbr_penalty=dict(weight=1e-3)),
}
OBSERVERS = [
    dict(type="GBRHook", num_samples=48, batch_size=16, projections=1),
    dict(type="FGSMHook", eps=(2, 8), num_samples=48),
    dict(type="ENCMonitorHook", interval=1),
]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_on_the_device_with_the_constraint_and_finite_measurements(tmp_path, name):
    cfg = digits_config(tmp_path, epochs=2, **RUNS[name])
    cfg.custom_hooks = OBSERVERS
    runner = train(cfg)
    assert next(runner.model.parameters()).is_cuda
    assert audit(runner.model).max_deviation < 1e-5
    logged = {key: value for line in scalars(tmp_path) for key, value in line.items()}
    for key in ("gbr/logits", "fgsm/top1_eps8", "accuracy/top1", "enc_monitor/angle/median"):
        assert math.isfinite(logged[key]), key


def test_measurements_leave_no_trace(tmp_path):
    ends = []
    for hooks in ([], OBSERVERS):
        cfg = digits_config(tmp_path / str(len(hooks)), epochs=2, **DETERMINISTIC)
        cfg.custom_hooks = hooks
        train(cfg)
        end = end_of(Path(cfg.work_dir, "epoch_2.pth"))
        end.pop("efolds", None)  # what ENCMonitorHook counts
        end["history"] = {k: v for k, v in end["history"].items() if not k.startswith("val/fgsm/")}
        ends.append(end)
    assert_same(*ends)


@MODELS.register_module(force=True)
class _Noisy(ResNetCIFAR6n):
    """Draws on the device in training: from torch's generator by dropout, and from one of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator("cuda").manual_seed(3)

    def forward(self, x):
        if self.training:
            x = nn.functional.dropout(x, 0.1) + torch.randn(x.shape, generator=self.generator, device=x.device)
        return super().forward(x)


@pytest.mark.parametrize("options", [{}, AMP | {"optim_wrapper__loss_scale": "dynamic"}], ids=["float32", "float16"])
def test_a_resumed_run_is_the_unbroken_one_with_random_numbers_drawn_on_the_device(tmp_path, options):
    def config(folder):
        cfg = digits_config(
            tmp_path / folder, epochs=3, default_hooks__logger__interval=1, model__backbone__type="_Noisy", **options
        )
        cfg.merge_from_dict(DETERMINISTIC | dict(model=dict(train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)))))
        return cfg

    train(config("whole"))
    stopped = config("resumed")
    stopped.custom_hooks = [dict(type="StopHook", epoch=1)]
    with pytest.raises(Stopped):
        train(stopped)
    torch.cuda.manual_seed_all(99)  # what the resumed run starts from is not what it goes on from
    again = config("resumed")
    again.resume = True
    train(again)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", "epoch_3.pth")
    state = torch.load(tmp_path / "whole" / "epoch_3.pth")["rng_state"]["ranks"][0]
    assert len(state["cuda"]) == torch.cuda.device_count()
    assert any(name.endswith("backbone.generator") for name in state["generators"])


@MODELS.register_module(force=True)
class _Breaking(ResNetCIFAR6n):
    """Its outputs are finite, and once their gradient is NaN."""

    breaks = False

    def forward(self, x):
        out = super().forward(x)
        if self.breaks and torch.is_grad_enabled():
            out[-1].register_hook(lambda grad: grad * math.nan)
        return out


@HOOKS.register_module(force=True)
class _BreakSecondStep(Hook):
    """Keeps the parameters of before the second step, and lets its gradients break."""

    before: dict

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            self.before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
            runner.model.backbone.breaks = True


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_of_before_the_step(tmp_path):
    runner = build_runner(digits_config(tmp_path, model__backbone__type="_Breaking"))
    hook = _BreakSecondStep()
    runner.register_hook(hook)
    with pytest.raises(FloatingPointError, match="a gradient is NaN or infinite in epoch 1, iteration 2") as stopped:
        runner.train()
    assert "only gradients are not finite, and the one nearest to the loss is that of 'backbone." in str(stopped.value)
    assert all(torch.equal(p, hook.before[name]) for name, p in runner.model.named_parameters())
    assert not list(tmp_path.glob("*.pth"))


def test_a_layer_that_overflows_is_named_though_its_step_was_taken(tmp_path):
    runner = build_runner(digits_config(tmp_path))
    runner._init_model_weights = lambda: None
    norm = runner.model.backbone.layer2[0].bn1
    norm.weight.data[0] = norm.bias.data[0] = 3e38
    with pytest.raises(FloatingPointError, match=r"the first output that is not finite is .*'backbone\.layer2\.0"):
        runner.train()


def test_one_process_on_nccl_trains(tmp_path):
    options = ["--work-dir", str(tmp_path), "--cfg-options", "train_cfg.max_epochs=1"]
    done = dist_train("configs/digits/resnet8_enc-ws_1xb64.py", 1, *options)
    assert "the distributed backend is gloo" not in done.stdout
    assert (tmp_path / "epoch_1.pth").is_file()


def test_the_demo_writes_its_report(tmp_path):
    done = run_command([sys.executable, "tools/demo.py", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()


def test_results_name_the_card_its_driver_and_its_settings():
    found = provenance(ROOT)["gpu"]
    assert found["name"] == torch.cuda.get_device_name()
    assert found["driver"].count(".") >= 1
    assert found["float32"] == {"products": "float32", "convolutions": "tf32"}
    torch.backends.cudnn.allow_tf32 = False
    assert provenance(ROOT)["gpu"]["float32"]["convolutions"] == "float32"
