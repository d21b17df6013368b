"""Features of training, alone and together, on real runs: ENC composes with them, or says before training why not.

Every cell trains with the measuring hooks on and is audited at its end. Slow cells carry the marker ``matrix``
(``make test-matrix``).
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from functional.test_decay import literal as shifted
from functional.test_weights import ALL
from helpers import (
    ROOT,
    build_runner,
    digits_config,
    free_port,
    on_processes,
    scalars,
    train,
    train_on_processes,
)
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, OPTIMIZERS
from mmengine.runner import Runner
from mmpretrain.engine.optimizers import LARS, Lamb  # noqa: F401  registers them
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from enc_plugin import ENCLinear, audit
from enc_plugin.engine import ENCOptimWrapperConstructor, limits
from enc_plugin.engine.limits import check_distributed, refuse_sharding
from enc_plugin.optim import add_shift, param_groups_enc

MEASURING = [
    dict(type="GBRHook", num_samples=16, batch_size=16),
    dict(type="FGSMHook", eps=4),
    dict(type="ENCMonitorHook", interval=1),
]
# Batch norms of the backbone keep the statistics they start with, the classifier has none: no sample sees its batch.
# With alpha 16 signals keep their size through the layers all the same.
UNCOUPLED = dict(model__backbone__norm_eval=True, model__enc=dict(post_norm=False, alpha=16.0))


@HOOKS.register_module(force=True)
class _Trace(Hook):
    """Keeps all parameters and buffers at the start and after each iteration, and the gradients that autograd left."""

    priority = "LOWEST"

    def before_train(self, runner):
        self.model = getattr(runner.model, "module", runner.model)
        self.grads = {name: [] for name, _ in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(
                    lambda p, kept=self.grads[name]: kept.append(p.grad.double().clone())
                )
        self.states = [self._state()]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.states.append(self._state())

    def _state(self):
        return {key: value.clone() for key, value in self.model.state_dict().items()}


@HOOKS.register_module(force=True)
class _ChannelsLast(Hook):
    """Puts the weights into channels-last memory format."""

    def before_train(self, runner):
        runner.model.to(memory_format=torch.channels_last)


def cell(work_dir: Path, hooks: tuple[dict, ...] = (), epochs: int = 1, **options) -> Runner:
    """Train with the measuring hooks on, and check the constraint and that everything was measured."""
    cfg = digits_config(work_dir, epochs=epochs, custom_hooks=[*MEASURING, *hooks], **options)
    runner = train(cfg)
    check(work_dir, runner.model)
    return runner


def check(work_dir: Path, model: nn.Module) -> None:
    table = audit(model)
    assert len(table) == 10
    assert table.max_deviation < 1e-5
    lines = scalars(work_dir)
    for key in ("enc/max_deviation", "gbr/logits", "fgsm/top1_eps4", "enc_monitor/norm/max"):
        values = [line[key] for line in lines if key in line]
        assert values, key
        assert all(map(math.isfinite, values)), key


def trace(runner: Runner) -> _Trace:
    return next(hook for hook in runner.hooks if isinstance(hook, _Trace))


def weights(runner: Runner) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in runner.model.named_parameters()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference of each tensor, relative to its largest element."""
    assert a.keys() == b.keys()
    for key, value in b.items():
        error = (a[key].double() - value.double()).abs().max().item()
        assert error <= tolerance * value.double().abs().max().item(), (key, error)


def log_text(work_dir: Path) -> str:
    return next(work_dir.glob("*/*.log")).read_text()


def test_two_accumulated_batches_of_32_are_one_of_64(tmp_path):
    one = cell(tmp_path / "one", hooks=(dict(type="_Trace"),), **UNCOUPLED)
    options = dict(train_dataloader__batch_size=32, optim_wrapper__accumulative_counts=2)
    two = cell(tmp_path / "two", **options, **UNCOUPLED)
    assert (one.iter, two.iter) == (3, 6)
    assert_close(weights(two), weights(one), 1e-5)
    start = trace(one).states[0]["backbone.layer2.0.conv1.weight"]
    assert (weights(one)["backbone.layer2.0.conv1.weight"] - start).abs().max() > 1e-4


def test_clipping_spares_the_shift_under_mixed_precision_and_accumulation(tmp_path):
    """With gradients clipped away, what is left of the step is the shifted decay, by the formula."""
    runner = cell(
        tmp_path,
        hooks=(dict(type="_Trace"),),
        train_dataloader__dataset__indices=64,
        train_dataloader__batch_size=32,
        optim_wrapper__type="AmpOptimWrapper",
        optim_wrapper__accumulative_counts=2,
        optim_wrapper__clip_grad=dict(max_norm=1e-9),
        optim_wrapper__optimizer__weight_decay=0.1,
        optim_wrapper__paramwise_cfg=dict(shift_eps=0.5),
    )
    start, unstepped, end = trace(runner).states
    for name in ("backbone.conv1.weight", "backbone.layer3.0.conv2.weight", "head.fc.weight"):
        before, after = start[name].double(), end[name].double()
        assert torch.equal(start[name], unstepped[name])
        torch.testing.assert_close(after, before - 0.1 * 0.1 * shifted(before, "ws", 0.5), rtol=1e-5, atol=1e-7)
        assert (after - before).abs().max() > 1e-3


def test_ema_weights_keep_the_constraint_and_are_those_validated_attacked_and_saved(tmp_path):
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.3)
    runner = cell(tmp_path / "run", hooks=(dict(type="_Trace"), ema), epochs=2)
    states = trace(runner).states
    # mmengine's average begins as a copy, which the first iteration replaces by the weights it left.
    mean = states[1]
    for state in states[2:]:
        mean = {key: 0.7 * mean[key] + 0.3 * state[key] for key in mean}
    checkpoint = torch.load(tmp_path / "run" / "epoch_2.pth")
    averaged = {key: checkpoint["state_dict"][key] for key in weights(runner)}
    assert_close(averaged, {key: mean[key] for key in averaged}, 1e-6)
    kept = {key.removeprefix("module."): value for key, value in checkpoint["ema_state_dict"].items()}
    assert_close({key: kept[key] for key in averaged}, weights(runner), 0)  # the trained ones, for resuming
    model = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert len(audit(model)) == 10
    assert audit(model).max_deviation < 1e-5

    cfg = digits_config(tmp_path / "test", load_from=str(tmp_path / "run" / "epoch_2.pth"))
    cfg.test_dataloader.dataset.indices = 64
    accuracy = build_runner(cfg).test()["accuracy/top1"]
    last = {key: value for line in scalars(tmp_path / "run") for key, value in line.items()}
    assert last["accuracy/top1"] == pytest.approx(accuracy)
    assert last["fgsm/top1_clean"] == pytest.approx(accuracy)


@pytest.mark.parametrize("how", ["with_cp", "option"])
def test_activation_checkpointing_trains_the_same_weights_and_the_warning_says_what_makes_statistics_equal(
    tmp_path, how
):
    plain = cell(tmp_path / "plain")
    assert "activation checkpointing" not in log_text(tmp_path / "plain")
    options = {"model__backbone__norm_cfg": dict(type="BN", momentum=1 - 0.9**0.5)}
    if how == "with_cp":
        options["model__backbone__with_cp"] = True
    else:
        options["activation_checkpointing"] = ["backbone.layer1", "backbone.layer2", "backbone.layer3"]
    run = cell(tmp_path / "cp", **options)
    assert log_text(tmp_path / "cp").count("ENC: activation checkpointing runs the forward pass") == 1
    assert_close(weights(run), weights(plain), 0)
    buffers = [{k: v for k, v in r.model.named_buffers() if ".layer" in k and "running" in k} for r in (run, plain)]
    assert len(buffers[0]) == 2 * 8
    assert_close(*buffers, 1e-5)
    count = "backbone.layer2.0.bn1.num_batches_tracked"
    assert run.model.state_dict()[count] == 2 * plain.model.state_dict()[count]


STEPPED = "backbone.layer2.0.conv1.weight"


def steps(work_dir: Path, optimizer: dict, **options) -> tuple[_Trace, Tensor, list[Tensor]]:
    """A run with a large shift (0.2), and of one weight, in float64, its start and its gradients."""
    options = dict(optim_wrapper__paramwise_cfg=dict(shift_eps=0.2), **options)
    optimizer = dict(_delete_=True, **optimizer)
    runner = cell(work_dir, hooks=(dict(type="_Trace"),), optim_wrapper__optimizer=optimizer, **options)
    assert "is not known" not in log_text(work_dir)
    found = trace(runner)
    assert len(found.grads[STEPPED]) == 3
    return found, found.states[0][STEPPED].double(), found.grads[STEPPED]


def test_frozen_stages_stay_bit_for_bit_and_the_rest_follows_adamw_with_the_decoupled_shift(tmp_path):
    adamw = dict(type="AdamW", lr=0.01, weight_decay=0.5)
    found, weight, grads = steps(tmp_path, adamw, model__backbone__frozen_stages=1)
    start, end = found.states[0], found.states[-1]
    frozen = [key for key in start if key.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))]
    assert len(frozen) == 3 * (2 + 5)  # weight and settings of a convolution, five entries of its batch norm
    for key in frozen:
        assert torch.equal(start[key], end[key]), key
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * update - 0.01 * 0.5 * shifted(weight, "ws", 0.2)
    assert_close({STEPPED: end[STEPPED]}, {STEPPED: weight}, 1e-5)


def test_lars_steps_along_the_gradient_with_the_shifted_decay(tmp_path):
    lars = dict(type="LARS", lr=5.0, momentum=0.9, weight_decay=0.1, eta=0.01)
    found, weight, grads = steps(tmp_path, lars)
    momentum = torch.zeros_like(weight)
    for grad in grads:
        decayed = grad + 0.1 * shifted(weight, "ws", 0.2)
        rate = 0.01 * weight.norm() / ((decayed - 0.1 * weight).norm() + 0.1 * weight.norm() + 1e-8)
        momentum = 0.9 * momentum + 5.0 * rate * decayed
        weight = weight - momentum
    assert_close({STEPPED: found.states[-1][STEPPED]}, {STEPPED: weight}, 1e-4)


def test_lamb_scales_gradient_and_shifted_decay_by_one_ratio(tmp_path):
    found, weight, grads = steps(tmp_path, dict(type="Lamb", lr=0.05, weight_decay=0.5, max_grad_norm=1e9))
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        decay = shifted(weight, "ws", 0.2)
        update = first / (1 - 0.9**step) / (second.sqrt() / math.sqrt(1 - 0.999**step) + 1e-6) + 0.5 * decay
        weight = weight - 0.05 * decay.norm() / update.norm() * update
    assert_close({STEPPED: found.states[-1][STEPPED]}, {STEPPED: weight}, 1e-4)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(
    "optimizer",
    [
        dict(type="SGD", lr=0.1, momentum=0.9),
        dict(type="AdamW", lr=0.1),
        dict(type="LARS", lr=50.0, momentum=0.9),
        dict(type="Lamb", lr=0.05),
    ],
    ids=lambda cfg: cfg["type"],
)
def test_without_a_gradient_weights_settle_at_the_shift_whatever_the_optimizer(optimizer, variant):
    """Row norms (wn, fro), row standard deviations (ws, centered_fro): where the regularizer has its minimum."""
    layer = ENCLinear(16, 4, bias=False, variant=variant).double()
    groups = param_groups_enc(nn.Sequential(layer), weight_decay=0.5, shift_eps=0.05)
    options = {key: value for key, value in optimizer.items() if key != "type"}
    built = OPTIMIZERS.get(f"mmpretrain.{optimizer['type']}")(groups, **options)
    add_shift(built, warn=pytest.fail)
    for _ in range(600):
        layer.weight.grad = torch.zeros_like(layer.weight)
        built.step()
    rows = layer.weight.detach().flatten(1) if variant in ("wn", "ws") else layer.weight.detach().reshape(1, -1)
    length = rows.norm(dim=1) if variant in ("wn", "fro") else rows.std(dim=1, correction=0)
    torch.testing.assert_close(length, torch.full_like(length, 0.05), rtol=1e-3, atol=0)


def test_channels_last_changes_rounding_alone(tmp_path):
    contiguous = cell(tmp_path / "a", **UNCOUPLED)
    last = cell(tmp_path / "b", hooks=(dict(type="_ChannelsLast"),), **UNCOUPLED)
    assert last.model.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(weights(last), weights(contiguous), 1e-4)


def test_sync_bn_on_one_process_is_batch_norm(tmp_path):
    """mmengine turns it back where there is nothing to synchronise."""
    sync = cell(tmp_path / "a", model__backbone__norm_cfg=dict(type="SyncBN"))
    plain = cell(tmp_path / "b")
    assert_close(dict(sync.model.state_dict()), dict(plain.model.state_dict()), 0)


def refused(path: Path, message: str) -> None:
    """The run of the config at ``path`` is an error before a runner exists."""
    cfg = Config.fromfile(path)
    cfg.launcher = "pytorch"
    with pytest.raises(ValueError, match=message):
        build_runner(cfg)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(sync_bn="torch"), "sync_bn: 'torch' needs GPUs"),
        (
            dict(model_wrapper_cfg=dict(type="MMFullyShardedDataParallel")),
            "splits the weights among the processes.* use DDP",
        ),
    ],
)
def test_what_gloo_or_enc_cannot_have_is_refused_before_training(tmp_path, option, message):
    digits_config(tmp_path / "run", **option).dump(tmp_path / "run.py")
    on_processes(1, refused, tmp_path / "run.py", message)


def test_a_norm_cfg_of_sync_bn_is_refused_with_the_layers_name(tmp_path):
    model = MODELS.build(digits_config(tmp_path, model__backbone__norm_cfg=dict(type="SyncBN")).model)
    with pytest.raises(ValueError, match="norm_cfg: layer 'backbone.bn1' is SyncBN, which needs GPUs.*leave it out"):
        check_distributed(None, None, model)


def test_mmengines_flexible_runner_trains_the_same_network(tmp_path):
    flexible = cell(tmp_path / "a", hooks=(dict(type="ENCAuditHook"),), runner_type="FlexibleRunner")
    assert type(flexible).__name__ == "FlexibleRunner"
    assert_close(dict(flexible.model.state_dict()), dict(cell(tmp_path / "b").model.state_dict()), 0)


def test_a_strategy_is_not_passed_over(tmp_path):
    with pytest.raises(ValueError, match="strategy: 'FSDPStrategy' is for mmengine's FlexibleRunner.*train with DDP"):
        build_runner(digits_config(tmp_path, strategy=dict(type="FSDPStrategy")))


@pytest.mark.skipif(importlib.util.find_spec("mmcv._ext") is not None, reason="full mmcv is installed")
def test_mmcvs_sync_bn_is_refused_where_mmcv_is_lite(monkeypatch):
    monkeypatch.setattr(limits, "get_device", lambda: "cuda")
    with pytest.raises(ValueError, match="sync_bn: 'mmcv' needs the compiled operators.*use sync_bn='torch'"):
        check_distributed("mmcv", None, nn.Sequential())
    check_distributed("torch", dict(type="MMDistributedDataParallel"), nn.Sequential())


def test_the_optimizer_refuses_a_sharded_model_whoever_wraps_it():
    """mmengine's FSDPStrategy wraps on its own; a real wrapper asks for an accelerator already when it is built."""
    model = nn.Sequential(FullyShardedDataParallel.__new__(FullyShardedDataParallel))
    nn.Module.__init__(model[0])
    with pytest.raises(ValueError, match=r"use DDP.*strategy=dict\(type='DDPStrategy'\)"):
        ENCOptimWrapperConstructor(dict(optimizer=dict(type="SGD", lr=0.1)))(model)
    refuse_sharding(nn.Sequential(nn.Linear(2, 2)))
    refuse_sharding(nn.parallel.DistributedDataParallel)


def distributed(work_dir: Path, processes: int, **options) -> dict:
    """Train on several processes with everything on that ENC composes with; the checkpoint, audited."""
    ema = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.3)
    cfg = digits_config(
        work_dir,
        custom_hooks=[*MEASURING, ema],
        train_dataloader__batch_size=16,
        optim_wrapper__type="AmpOptimWrapper",
        optim_wrapper__accumulative_counts=2,
        optim_wrapper__clip_grad=dict(max_norm=5.0),
        model__backbone__frozen_stages=0,
        **options,
    )
    train_on_processes(cfg, processes)
    return audited_checkpoint(work_dir)


def audited_checkpoint(work_dir: Path) -> dict:
    """The last checkpoint of a digits run: trained and averaged weights keep the constraint."""
    checkpoint = torch.load(work_dir / "epoch_1.pth")
    model = build_runner(digits_config(work_dir / "audit")).model
    model.load_state_dict(checkpoint["state_dict"])
    check(work_dir, model)
    if "ema_state_dict" in checkpoint:
        state = {key.removeprefix("module."): value for key, value in checkpoint["ema_state_dict"].items()}
        model.load_state_dict({key: value for key, value in state.items() if key != "steps"})
        check(work_dir, model)
    return checkpoint


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_ddp_with_mixed_precision_accumulation_clipping_ema_and_a_frozen_stem(tmp_path, processes):
    distributed(tmp_path / "run", processes)


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_a_compiled_step_is_the_eager_one(tmp_path):
    # Rows without a mean take a constant background to 0, where rounding decides what ReLU lets through: hence 'wn'.
    options = UNCOUPLED | dict(model__enc=dict(variant="wn", post_norm=False, alpha=16.0))
    eager = cell(tmp_path / "eager", hooks=(dict(type="_Trace"),), **options)
    compiled = cell(tmp_path / "compiled", compile=True, **options)
    assert 'Model has been "compiled"' in log_text(tmp_path / "compiled")
    assert_close(weights(compiled), weights(eager), 1e-5)
    start, end = trace(eager).states[0], trace(eager).states[-1]
    for name in weights(eager):
        if name.endswith("conv1.weight"):
            assert (end[name] - start[name]).norm() > 1e-3 * start[name].norm(), name


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "mmpretrain.LARS", "mmpretrain.Lamb"])
def test_an_optimizer_step_with_the_shift_can_be_compiled(optimizer):
    """As a part of the training step that ``compile=True`` compiles, from groups that are mmengine's kind of dict."""
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(ENCLinear(8, 6), ENCLinear(6, 4, variant="wn"))
        cfg = Config(dict(optimizer=dict(type=optimizer, lr=0.01, weight_decay=0.1))).to_dict()
        wrapper = ENCOptimWrapperConstructor(Config(cfg)._cfg_dict, dict(shift_eps=0.2))(model)
        step = torch.compile(wrapper.optimizer.step, backend="eager") if compiled else wrapper.optimizer.step
        for _ in range(3):
            model(torch.randn(5, 8)).square().sum().backward()
            step()
            wrapper.optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    for eager, traced in zip(*weights, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_two_nodes_of_one_process_are_one_node_of_two(tmp_path):
    cfg = digits_config(tmp_path / "nodes", custom_hooks=MEASURING, train_dataloader__batch_size=16)
    (tmp_path / "nodes").mkdir()
    cfg.dump(tmp_path / "nodes" / "config.py")
    command = ["bash", "tools/dist_train.sh", str(tmp_path / "nodes" / "config.py"), "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NNODES": "2", "PORT": str(free_port())}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    agents = [subprocess.Popen(command, cwd=ROOT, env=env | {"NODE_RANK": str(i)}, **pipe) for i in range(2)]
    for agent in agents:
        output, _ = agent.communicate(timeout=600)
        assert agent.returncode == 0, output[-6000:]
    two_nodes = audited_checkpoint(tmp_path / "nodes")

    cfg.work_dir = str(tmp_path / "one")
    train_on_processes(cfg, 2)
    one_node = audited_checkpoint(tmp_path / "one")
    assert_close(two_nodes["state_dict"], one_node["state_dict"], 0)
