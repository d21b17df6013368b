"""GPU benchmark of ResNet-50: training steps, optimizer steps, measurements and inference, of ENC and similar layers.

Times are measured by CUDA events around several calls, so kernel launches count only if the GPU waits for them. Each
part gets a share of the minutes, and the result is saved after each part, for short sessions on a GPU. ``run`` also
works on the CPU, to test it; these times say nothing about GPUs.
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
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from enc_plugin import fold
from enc_plugin.build import pick_device
from enc_plugin.functional import fgsm, gbr
from enc_plugin.packed import pack_weights
from enc_plugin.refused import describe

from .harness import event_clock, goal, interleave, ratios, wall_clock
from .networks import resnet50
from .rivals import CONVERSIONS, sgd
from .training_step import step

NEEDS_CUDA = True

ENC = ("ENC ws", "ENC wn", "ENC fro", "ENC centered_fro")
# By default, the weights of all layers are computed together on a GPU, and layer by layer under torch.compile.
BY_LAYER = ", layer by layer"
RIVALS = ("timm StdConv2d", "mmcv ConvWS2d", "torch weight_norm", "a copy of the weight")
# Compiling each takes up to a minute. The most important ones come first, in case the time is up.
COMPILED = ("plain", "ENC ws", "timm StdConv2d", "torch weight_norm", "ENC wn", "ENC fro", "ENC centered_fro")
PRECISIONS = {
    "bfloat16 channels_last": (torch.bfloat16, torch.channels_last),
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

    def timed(self, calls: dict[str, Callable], reference: str, in_a_row: int = 5) -> dict:
        """Table of ratios, with as many rounds as the time allows, but at least three."""
        clock = partial(event_clock, calls=in_a_row) if self.device.type == "cuda" else wall_clock
        start = time.perf_counter()
        interleave(calls, rounds=0, warmup=2, clock=clock)
        a_round = (time.perf_counter() - start) / 2
        rounds = int(min(self.rounds, max(3, (self.until - time.perf_counter()) / a_round)))
        return ratios(interleave(calls, rounds, warmup=0, clock=clock), reference)


def _step(network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None, compiled: bool) -> Callable:
    """A function that takes one step of fused SGD with the shift, under autocast to ``dtype`` if given."""
    optimizer = sgd(network.train(), fused=True)

    def loss() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return cross_entropy(network(images, mode="tensor"), labels)

    return step(optimizer, torch.compile(loss) if compiled else loss)


def training(setting: Setting, precision: str, compiled: bool = False) -> dict:
    """Training steps of all networks; their peak memory, and what the host and the device do in a step."""
    dtype, layout = PRECISIONS[precision]
    images, labels = setting.pictures()
    images = images.contiguous(memory_format=layout)
    calls, memory, failed = {}, {}, {}
    for name in COMPILED if compiled else ("plain", ENC[0], ENC[0] + BY_LAYER, *ENC[1:], *RIVALS):
        if len(calls) > 1 and time.perf_counter() > setting.until:
            failed[name] = "not tried, because the time was up"
            continue
        before = _allocated()
        try:
            call = _step(setting.network(name, layout), images, labels, dtype, compiled)
            call()
            memory[name] = {"MiB at the peak": _peak(call) - before, **_anatomy(call)}
            calls[name] = call
        except Exception as error:  # the other networks are still measured
            failed[name] = describe(error, 500)
    return {"to_plain": setting.timed(calls, "plain"), "peak": memory, "failed": failed}


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
    step = _step(network, images[: setting.batch], labels[: setting.batch], None, False)
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
    "step, bfloat16 channels_last": (0.2, partial(training, precision="bfloat16 channels_last")),
    "optimizer step": (0.05, optimizer_step),
    "inference": (0.1, inference),
    "measurements": (0.15, measurements),
    "step, float32": (0.15, partial(training, precision="float32")),
    "step, bfloat16 channels_last, compiled": (
        0.35,
        partial(training, precision="bfloat16 channels_last", compiled=True),
    ),
}


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
            result[part] = measure(setting)
        except Exception as error:  # the other parts still run
            result[part] = {"failed": {part: describe(error, 500)}}
        result["counts"] = {
            f"{name}, {part.removeprefix('step, ')}": row
            for part in result
            if isinstance(result[part], dict)
            for name, row in result[part].get("peak", {}).items()
        }
        result["goals"] = [
            goal(f"{part}: ENC ws, to plain", result[part]["to_plain"]["ENC ws"], 1.02)
            for part in result
            if part.startswith("step, bfloat16") and "ENC ws" in result[part].get("to_plain", {})
        ]
        yield result
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _allocated() -> float:
    """Allocated GPU memory in MiB; 0 without a GPU."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def _anatomy(call: Callable[[], None], calls: int = 5) -> dict[str, float]:
    """What a call asks of the host and of the device: it takes as long as the busier of both; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    rows = profiled.key_averages()
    kernels = [row for row in rows if row.device_type is DeviceType.CUDA and not row.is_user_annotation]
    return {
        "ms of the host": 1e3 * host / calls,
        "ms of kernels": sum(row.self_device_time_total for row in kernels) / 1e3,
        "kernels": sum(row.count for row in kernels),
    }


def _peak(call: Callable[[], None]) -> float:
    """Peak of the allocated GPU memory during ``call``, in MiB; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20
