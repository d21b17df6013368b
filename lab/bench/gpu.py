"""GPU benchmark of ResNet-50: training steps, optimizer steps, measurements and inference, of ENC and similar layers.

Times are measured by CUDA events around several calls, so kernel launches count only if the GPU waits for them. Each
part gets a share of the minutes, and the result is saved after each part, for short sessions on a GPU: the figures that
decide come first, and the profiler last, because it slows down what follows. ``run`` also works on the CPU, to test it;
these times say nothing about GPUs.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from enc_plugin import fold
from enc_plugin.build import pick_device
from enc_plugin.functional import fgsm, gbr
from enc_plugin.packed import pack_weights
from enc_plugin.refused import describe

from .harness import event_clock, goal, interleave, ratios, wall_clock
from .networks import resnet50
from .on_gpu import allocated, captured, host_ms, kernels, peak
from .rivals import CONVERSIONS, sgd
from .training_step import step

NEEDS_CUDA = True

ENC = ("ENC ws", "ENC wn", "ENC fro", "ENC centered_fro")
# By default, the weights of all layers are computed together on a GPU, and layer by layer under torch.compile.
BY_LAYER = ", layer by layer"
RIVALS = ("timm StdConv2d", "mmcv ConvWS2d", "torch weight_norm", "a copy of the weight")
# Networks of the parts that decide. More follow while there is time, the most important ones first.
DECIDING = ("plain", "ENC ws", "a copy of the weight")
CAPTURED = ("plain", "ENC ws", "ENC wn", "ENC fro")
COMPILED = ("plain", "ENC ws", "timm StdConv2d", "torch weight_norm", "ENC wn", "ENC fro", "ENC centered_fro")
EVERY = ("plain", ENC[0], ENC[0] + BY_LAYER, *ENC[1:], *RIVALS)
WARM_UP = 12  # steps of each network before any is timed
TIME_IS_UP = "not tried, because the time was up"
BF16 = "bfloat16 channels_last"
PRECISIONS = {
    BF16: (torch.bfloat16, torch.channels_last),
    "float32": (None, torch.contiguous_format),
}
EPS = [1 / 255, 2 / 255, 4 / 255, 8 / 255]


@dataclass(frozen=True)
class Setting:
    """Networks, images and time of a part."""

    converted: Callable[[str], nn.Module]  # network by name, on the CPU; returns the same object each time
    batch: int
    size: int
    rounds: int
    until: float  # end of the part, as time.perf_counter()

    @property
    def device(self) -> torch.device:
        return pick_device(None)

    def pictures(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """``count`` images and labels, by default one batch."""
        count = count or self.batch
        images = torch.rand(count, 3, self.size, self.size, device=self.device)
        return images, torch.randint(10, (count,), device=self.device)

    def network(self, name: str, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
        """A copy of the network on the device."""
        network = copy.deepcopy(self.converted(name)).to(self.device)
        # mmcv's layer takes views of its weight, which fail in channels_last format.
        return network if name == "mmcv ConvWS2d" else network.to(memory_format=layout)

    def timed(self, calls: dict[str, Callable], reference: str, in_a_row: int = 5, least: int = 6) -> dict:
        """Table of ratios, with as many rounds as the time allows, but at least ``least`` (six give an interval)."""
        clock = partial(event_clock, calls=in_a_row) if self.device.type == "cuda" else wall_clock
        start = time.perf_counter()
        interleave(calls, rounds=0, warmup=2, clock=clock)
        a_round = (time.perf_counter() - start) / 2
        rounds = int(min(self.rounds, max(least, (self.until - time.perf_counter()) / a_round)))
        return ratios(interleave(calls, rounds, warmup=0, clock=clock), reference)


def _step(
    network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None, how: str = "eager"
) -> Callable:
    """A function that takes one step of fused SGD with the shift, under autocast to ``dtype`` if given; warmed up."""
    optimizer = sgd(network.train(), fused=True)

    def loss() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return cross_entropy(network(images, mode="tensor"), labels)

    call = step(optimizer, torch.compile(loss) if how == "compiled" else loss)
    for _ in range(WARM_UP):
        call()
    return captured(call) if how == "captured" else call


def _steps(setting: Setting, precision: str, names: tuple[str, ...], how: str) -> tuple[dict, dict, dict]:
    """Steps of the networks, by name: functions that take one, their peak memory, and why others are missing."""
    dtype, layout = PRECISIONS[precision]
    images, labels = setting.pictures()
    images = images.contiguous(memory_format=layout)
    calls, memory, failed, took = {}, {}, {}, 0.0
    for name in names:
        start = time.perf_counter()
        if len(calls) > 1 and start + took > setting.until:
            failed[name] = TIME_IS_UP
            continue
        before = allocated()
        try:
            call = _step(setting.network(name, layout), images, labels, dtype, how)
            memory[name] = {"MiB at the peak": peak(call) - before}
            calls[name] = call
        except Exception as error:  # the other networks are still measured
            failed[name] = describe(error, 500)
        took = time.perf_counter() - start
    return calls, memory, failed


def training(
    setting: Setting, precision: str, names: tuple[str, ...] = EVERY, how: str = "eager", least: int = 6
) -> dict:
    """Training steps of networks; their peak memory, and how long the host is busy with a step.

    Args:
        setting: Of the part.
        precision: Key of :data:`PRECISIONS`.
        names: Networks, those that must be there first. From the third on, one is left out if the time is up.
        how: ``'eager'``, ``'compiled'``, or ``'captured'``: the whole step is one CUDA graph, whose time is that of the
            kernels, because the host has no part in it.
        least: Rounds at least.
    """
    if how == "captured" and setting.device.type != "cuda":
        return {"skipped": f"a step is captured on a CUDA device, not on {setting.device}"}
    if how == "compiled":
        torch.compiler.reset()  # all steps share their code, of which torch compiles eight versions at most
    calls, memory, failed = _steps(setting, precision, names, how)
    table = setting.timed(calls, "plain", least=least)
    if setting.device.type == "cuda":
        for name, call in calls.items():
            memory[name]["ms of the host"] = host_ms(call)
    return {"to_plain": table, "peak": memory, "failed": failed}


def profiled(setting: Setting, precision: str, names: tuple[str, ...] = EVERY) -> dict:
    """Kernels of a step. Nothing is timed after this part."""
    if setting.device.type != "cuda":
        return {"skipped": f"kernels are those of a CUDA device, not of {setting.device}"}
    calls, _, failed = _steps(setting, precision, names, "eager")
    return {"peak": {name: kernels(call) for name, call in calls.items()}, "failed": failed}


def optimizer_step(setting: Setting) -> dict:
    """The optimizer step, with the foreach and the fused implementation of SGD."""
    calls = {}
    for name in ("plain", *ENC):
        for options in ({"foreach": True}, {"fused": True}):
            network = setting.network(name, torch.channels_last)
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            calls[f"{name}, {next(iter(options))}"] = sgd(network, **options).step
    return {"to_plain_fused": setting.timed(calls, "plain, fused", in_a_row=20)}


def measurements(setting: Setting) -> dict:
    """GBR and FGSM of four batches of images, compared with a training step of one batch in float32."""
    network = setting.network("ENC ws")
    images, labels = setting.pictures(4 * setting.batch)
    step = _step(network, images[: setting.batch], labels[: setting.batch], None)
    forward = partial(network, mode="tensor")

    def evaluated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            network.eval()
            call()
            network.train()

        return run

    calls = {"training step": step}
    for size in (setting.batch, 4 * setting.batch):
        name = f"GBR, 1 projection, batches of {size}"
        calls[name] = evaluated(partial(gbr, forward, images, projections=1, batch_size=size))
    eight = partial(gbr, forward, images, projections=8, batch_size=4 * setting.batch)
    calls[f"GBR, 8 projections, batches of {4 * setting.batch}"] = evaluated(eight)
    calls["FGSM, 4 eps"] = evaluated(lambda: [forward(x) for x in fgsm(forward, images, labels, EPS)])
    return {"to_a_training_step": setting.timed(calls, "training step", in_a_row=1)}


def inference(setting: Setting) -> dict:
    """Forward passes in eval mode with one image and with a batch: live, which compute their weights, and folded."""
    found = {}
    for precision, (dtype, layout) in PRECISIONS.items():
        names = ("plain", "ENC ws", "ENC ws" + BY_LAYER)
        networks = {name: setting.network(name, layout).eval() for name in names}
        networks["ENC ws, folded"] = fold(networks["ENC ws"]).eval()
        networks["plain again"] = copy.deepcopy(networks["plain"])
        for batch in (1, setting.batch):
            images = setting.pictures(batch)[0].contiguous(memory_format=layout)

            def forward(network: nn.Module, images: Tensor = images, dtype: torch.dtype | None = dtype) -> None:
                autocast = torch.autocast(images.device.type, dtype, enabled=dtype is not None)
                with torch.inference_mode(), autocast:
                    network(images, mode="tensor")

            calls = {name: partial(forward, network) for name, network in networks.items()}
            found[f"{precision}, batch {batch}"] = setting.timed(calls, "plain", in_a_row=10)
    return found


# Name -> share of the time, function.
PARTS: dict[str, tuple[float, Callable[[Setting], dict]]] = {
    f"step, {BF16}": (0.1, partial(training, precision=BF16, names=DECIDING, least=9)),
    f"step, {BF16}, captured": (0.12, partial(training, precision=BF16, names=CAPTURED, how="captured", least=9)),
    f"step, {BF16}, compiled": (0.35, partial(training, precision=BF16, names=COMPILED, how="compiled", least=9)),
    f"step, {BF16}, all networks": (0.15, partial(training, precision=BF16)),
    "optimizer step": (0.04, optimizer_step),
    "inference": (0.06, inference),
    "measurements": (0.06, measurements),
    "step, float32": (0.07, partial(training, precision="float32")),
    f"kernels, {BF16}": (0.05, partial(profiled, precision=BF16)),
}
GOAL = 1.02
DECISIVE = (f"step, {BF16}", f"step, {BF16}, captured", f"step, {BF16}, compiled")


def run(
    rounds: int = 21,
    minutes: float = 6.0,
    batch: int = 32,
    size: int = 224,
    build: Callable[[], nn.Module] = resnet50,
    parts: tuple[str, ...] = tuple(PARTS),
) -> Iterator[dict]:
    """Run the parts within about ``minutes`` and yield the result after each part.

    Args:
        rounds: Maximum number of rounds of each table.
        minutes: Time for all parts together. A compilation is not interrupted.
        batch, size: Batch size and side of the images.
        build: Builds the plain network, with at least ten classes.
        parts: Names of the parts, from :data:`PARTS`.
    """
    torch.backends.cudnn.benchmark = True
    result: dict = {"what": f"{build.__name__}, images of {size} x {size}, batch {batch}, fused SGD with momentum"}
    base = build()

    @functools.cache
    def converted(name: str) -> nn.Module:
        network = CONVERSIONS[name.removesuffix(BY_LAYER)](copy.deepcopy(base))
        if name.endswith(BY_LAYER):
            pack_weights(network, False)
        return network

    left, end = sum(PARTS[part][0] for part in parts), time.perf_counter() + 60 * minutes
    for part in parts:
        share, measure = PARTS[part]
        now = time.perf_counter()
        setting = Setting(converted, batch, size, rounds, now + (end - now) * share / left)
        left -= share
        try:
            result[part] = measure(setting) if now < end else {"skipped": TIME_IS_UP}
        except Exception as error:  # the other parts still run
            result[part] = {"failed": {part: describe(error, 500)}}
        result["counts"], result["goals"] = _counts(result), _goals(result)
        yield result
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _counts(result: dict) -> dict[str, dict[str, float]]:
    """What was counted of each network and precision, in whichever part."""
    counts: dict[str, dict[str, float]] = {}
    for part in PARTS:
        for name, row in result.get(part, {}).get("peak", {}).items():
            counts.setdefault(f"{name}, {part.partition(', ')[2]}", {}).update(row)
    return counts


def _goals(result: dict) -> list[dict]:
    tables = {part: result.get(part, {}).get("to_plain", {}) for part in DECISIVE}
    return [
        goal(f"{part}: ENC ws, to plain", rows["ENC ws"], GOAL) for part, rows in tables.items() if "ENC ws" in rows
    ]
