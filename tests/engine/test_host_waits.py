"""Nothing in a training step reads a value from the device: the host would wait for all that it has launched."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import TORCH, build_runner, digits_config
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from enc_plugin import add_shift, param_groups_enc, to_enc
from enc_plugin.engine.unread_step import UnreadStep
from enc_plugin.functional import VARIANTS, gbr_penalty

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, foreach=True)),
    "AdamW": (torch.optim.AdamW, dict(lr=1e-3, capturable=False, foreach=True)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [1.0, "learnable"])
def test_layers_shift_penalty_and_the_guards_look_read_nothing(variant, optimizer, alpha):
    """Tensors of the meta device have no values: whatever would read one raises."""
    if variant == "wn" and TORCH < (2, 8):
        pytest.skip("this version of torch has no weight norm without values")
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 5))
    to_enc(net, variant, alpha)
    net.to("meta")
    kind, options = OPTIMIZERS[optimizer]
    optimizer = kind(param_groups_enc(net, 1e-2), **options)
    add_shift(optimizer)
    looks = []

    def look(optimizer, args, kwargs) -> None:
        looks.append(UnreadStep(p for group in optimizer.param_groups for p in group["params"]))

    optimizer.register_step_pre_hook(look)
    images, labels = torch.empty(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    for _ in range(2):
        optimizer.zero_grad()
        x = images.detach().requires_grad_()
        out = net(x)
        (cross_entropy(out, labels) + gbr_penalty(x, out, projections=2)).backward()
        optimizer.step()
    assert len(looks) == 2
    with pytest.raises(RuntimeError, match="meta"):
        looks[0].is_finite()


class _Reads(TorchDispatchMode):
    """Notes of each value that is read which file of this package reads it, itself or by a function of torch."""

    READING = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in self.READING:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            folder, _, name = frame.f_code.co_filename.rpartition("/")
            if "/enc_plugin" in folder:
                self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_of_a_runs_hooks_the_guard_alone_reads_the_gradients_of_a_cpu_and_the_logged_loss(tmp_path):
    """Two reads an iteration: on a CPU nothing waits for them, elsewhere the first one is an UnreadStep."""
    cfg = digits_config(tmp_path, epochs=2, model__gbr_penalty=dict(weight=1e-3))
    cfg.custom_hooks = [dict(type="GBRHook", num_samples=8), dict(type="FGSMHook", eps=8, num_samples=8)]
    cfg.custom_hooks += [dict(type="ENCMonitorHook", interval=1000), dict(type="EMAHook")]
    runner = build_runner(cfg)
    reads, iterations = _Reads(), []
    loop = runner.build_train_loop(runner._train_loop)
    run_iter = loop.run_iter

    def watched(*args) -> None:
        iterations.append(loop.iter)
        if loop.iter in (1, 2):  # what is measured and saved after an epoch may wait
            with reads:
                run_iter(*args)
        else:
            run_iter(*args)

    loop.run_iter = watched
    runner._train_loop = loop
    runner.train()
    assert len(iterations) == 6
    assert reads.found == ["diagnosis.py", "guard_hook.py"] * 2
