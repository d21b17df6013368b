"""What a call asks of a GPU and of its host: memory, host time, kernels; and calls that are replayed as CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile


def allocated() -> float:
    """Allocated GPU memory in MiB; 0 without a GPU."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def peak(call: Callable[[], object]) -> float:
    """Peak of the allocated GPU memory during ``call``, in MiB; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


def host_ms(call: Callable[[], object], calls: int = 15) -> float:
    """Milliseconds until a call on an idle GPU returns to the host: the median of single calls."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def kernels(call: Callable[[], object]) -> dict[str, float]:
    """Number and milliseconds of a call's kernels, by torch's profiler.

    The profiler stays attached to the GPU and slows down all later calls (https://github.com/pytorch/pytorch/issues/144455):
    time before you profile.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    rows = rows_of(profiled.key_averages(), DeviceType.CUDA)
    return {
        "ms of kernels": sum(row.self_device_time_total for row in rows) / 1e3,
        "kernels": sum(row.count for row in rows),
    }


def rows_of(rows: Iterable[FunctionEventAvg], kind: DeviceType) -> list[FunctionEventAvg]:
    """The rows of a profile that are work of a kind of device, without the names that code gives to its parts."""
    return [row for row in rows if row.device_type == kind and not row.is_user_annotation]


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A function that repeats ``call`` as one CUDA graph: the host only starts it.

    Args:
        call: Does the same in each call, and has been called before, so that nothing is prepared in it any more.

    Raises:
        RuntimeError: If the call cannot be captured, because it waits for the GPU, for example.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries prepare what they need for each stream
            call()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize()

    def replay(kept: object = call) -> None:  # the graph uses the memory of what the call refers to
        graph.replay()

    return replay
