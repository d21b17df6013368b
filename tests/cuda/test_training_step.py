"""A training step on the device: precision, layout, compiler, graph capture, optimizers; nothing in it waits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import TOLERANCE, batch, error, errors, network, optimizer_of, stepper
from torch.nn.functional import cross_entropy

from enc_plugin import audit
from enc_plugin.functional import VARIANTS, gbr_penalty
from enc_plugin.packed import pack_weights

STEPS = 3


def trained(
    device,
    variant="ws",
    dtype=None,
    layout=torch.contiguous_format,
    kind=torch.optim.SGD,
    how="reparametrize",
    **options,
):
    """A network after a few steps, and its last loss."""
    net = network(variant, how=how).to(device=device, memory_format=layout)
    images, labels = batch(device)
    step = stepper(net, optimizer_of(net, kind, **options), images.contiguous(memory_format=layout), labels, dtype)
    for _ in range(STEPS):
        loss = step()
    return net, loss


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_trains_as_the_cpu_does(device, variant, layout):
    net, _ = trained(device, variant, layout=layout)
    twin, _ = trained(torch.device("cpu"), variant)
    assert errors(net, twin) < TOLERANCE
    assert audit(net).max_deviation < 1e-5


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["retract", "rotate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_projected_weights_train_as_on_the_cpu(device, variant, mode, layout):
    net, _ = trained(device, variant, layout=layout, how="project", projection=mode)
    twin, _ = trained(torch.device("cpu"), variant, how="project", projection=mode)
    assert errors(net, twin) < TOLERANCE
    assert audit(net).max_deviation < 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_trains_near_float32_and_keeps_the_constraint(device, variant, layout):
    net, loss = trained(device, variant, torch.bfloat16, layout)
    _, expected = trained(torch.device("cpu"), variant)
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert audit(net).max_deviation < 1e-5
    assert all(p.dtype is torch.float32 for p in net.parameters())


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_are_computed_together_are_those_of_the_layers(device, variant, layout, dtype):
    images, labels = batch(device)
    images, outs, grads = images.contiguous(memory_format=layout), [], []
    for packed in (True, False):
        net = network(variant).to(device=device, memory_format=layout)
        pack_weights(net, packed)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = net(images)
        cross_entropy(out, labels).backward()
        outs.append(out)
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    tolerance = 1e-5 if dtype is None else 2e-2
    assert error(*outs) < tolerance
    assert error(*grads) < 10 * tolerance


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_skips_an_overflow_and_the_shift_with_it(device, fused):
    net = network().to(device)
    optimizer, (images, labels) = optimizer_of(net, fused=fused), batch(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1000)
    before = copy.deepcopy(net.state_dict())
    taken = 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = cross_entropy(net(images), labels)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:  # an overflow
            assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()), "the step was not skipped"
            continue
        taken += 1
        if taken == STEPS:
            break
        before = copy.deepcopy(net.state_dict())
    assert taken == STEPS
    assert audit(net).max_deviation < 1e-5
    _, expected = trained(torch.device("cpu"))
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_and_foreach_optimizers_shift_as_the_plain_loop_does(device, kind):
    nets = [trained(device, kind=kind, **{name: True})[0] for name in ("fused", "foreach")]
    twin, _ = trained(device, kind=kind, foreach=False)
    assert all(errors(net, twin) < TOLERANCE for net in nets)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("variant", ["ws", "fro"])
def test_a_compiled_network_trains_as_the_eager_one(device, variant):
    images, labels = batch(device)
    nets = [network(variant).to(device) for _ in range(2)]
    for net, forward in zip(nets, (nets[0], torch.compile(nets[1])), strict=True):
        step = stepper(forward, optimizer_of(net), images, labels)
        for _ in range(STEPS):
            step()
    assert errors(*nets) < TOLERANCE


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.SGD, {"foreach": True}),
        (torch.optim.AdamW, {"capturable": True, "foreach": True}),
    ],
    ids=["fused SGD", "foreach SGD", "AdamW"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_step_is_captured_in_a_graph_and_its_replay_trains(device, variant, kind, options, dtype):
    images, labels = batch(device)
    nets = [network(variant).to(device) for _ in range(2)]
    steps = [stepper(net, optimizer_of(net, kind, **options), images, labels, dtype) for net in nets]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            steps[0]()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        steps[0]()
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        steps[1]()
    assert errors(*nets) < (TOLERANCE if dtype is None else 0.1)  # a step less changes parameters by 0.2 or more


def test_no_part_of_a_training_step_waits_for_the_device(device):
    """Layers, shift, projection, the guard's look at the gradients and the penalty on the GBR."""
    unread_step = pytest.importorskip(
        "enc_plugin.engine.unread_step", reason="the guard needs mmengine", exc_type=ImportError
    )
    nets = [network(variant).to(device) for variant in VARIANTS]
    optimizers = [optimizer_of(net, fused=i % 2 == 0) for i, net in enumerate(nets)]
    for mode in ("retract", "rotate"):
        nets.append(network(how="project").to(device))
        optimizers.append(optimizer_of(nets[-1], projection=mode))
    steps = []

    def look(optimizer, args, kwargs) -> None:
        steps.append(unread_step.UnreadStep(p for group in optimizer.param_groups for p in group["params"]))

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(look)
    images, labels = batch(device)

    def step(net, optimizer):
        optimizer.zero_grad()
        x = images.detach().requires_grad_()
        out = net(x)
        (cross_entropy(out, labels) + 1e-3 * gbr_penalty(x, out, projections=2)).backward()
        optimizer.step()

    for pair in zip(nets, optimizers, strict=True):
        step(*pair)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for pair in zip(nets, optimizers, strict=True):
            step(*pair)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 2 * len(nets)
    assert all(taken.is_finite() for taken in steps)
