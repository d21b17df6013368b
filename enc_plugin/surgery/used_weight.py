"""The weight that a layer really computes with, found by running the layer.

Many layers do not use ``weight`` directly: weight standardization, weight norm, spectral norm, pruning, adapters. Some
pad in their forward pass and not by their attribute ``padding``. A layer in eval mode is an affine map. Its linear part
is taken from the convolution operation that ran, or from the layer's outputs for known inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..functional.linear_maps import map_rows_sq_norm
from ..layers import ENCLayer, StockLayer
from .restored import restored

ConvLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d

_MAX_ELEMENTS = 2**23  # largest size of a batch of test inputs
_MAX_OUTPUTS = 4096  # largest number of outputs of a layer whose whole Jacobian is computed


class UnclearWeightError(ValueError):
    """A layer is not a linear map of its input, or does not run outside of its network."""


@dataclass(frozen=True)
class UsedWeight:
    """Squared norms of a layer's linear part in eval mode, without its post-norm.

    Attributes:
        rows: Squared norm of each row of the kernel or matrix, ``(out,)``, float64.
        map_rows: Squared norm of each output channel's linear map on inputs of the given size, ``(out,)``, float64;
            None if unknown.
    """

    rows: Tensor
    map_rows: Tensor | None


@torch.no_grad()
def used_weight(layer: StockLayer, shape: torch.Size, with_map: bool) -> UsedWeight:
    """Measure the weight that a convolution or linear layer, ENC or plain, computes with.

    The layer runs a few times on inputs of one sample. It does not change.

    Args:
        layer: ``nn.Conv1d/2d/3d``, ``nn.Linear`` or a subclass.
        shape: Shape of the layer's input in the network, with or without the batch dimension.
        with_map: Whether to measure the linear map too, which takes further forward passes of a convolution.

    Raises:
        UnclearWeightError: If the layer is not an affine map of its input, or does not run outside of its network.
    """
    # The weight's shape is not used: in train mode, each access to a weight with spectral norm changes it.
    batched = len(shape) > (1 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 1)
    sample = (1, *(shape[1:] if batched else shape))
    with restored(layer):
        layer.__dict__["_enc_norm_name"] = None  # without the post-norm, until the attributes are restored
        try:
            if isinstance(layer, nn.Linear):
                return _of_matrix(layer, sample)
            return _of_kernel(layer, sample, with_map)
        except UnclearWeightError:
            raise
        except Exception as error:  # such as layers with sparse inputs or further arguments
            raise UnclearWeightError(f"{type(layer).__name__} does not run outside of the network: {error}") from error


def _random(layer: StockLayer, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # does not change the global random state
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(layer.weight.device, layer.weight.dtype)


def _are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the norm of ``a - b`` is at most ``tolerance`` times that of ``b``; False for NaN."""
    a, b = a.double(), b.double()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


def _not_linear(layer: StockLayer) -> UnclearWeightError:
    return UnclearWeightError(
        f"{type(layer).__name__} is not a linear map of its input (does it contain an activation or a norm?)"
    )


def _of_matrix(layer: nn.Linear, sample: tuple[int, ...]) -> UsedWeight:
    x = _random(layer, sample)
    zero = layer(torch.zeros_like(x))
    out = layer(x) - zero
    eps = torch.finfo(out.dtype).eps
    weight = layer.effective_weight if isinstance(layer, ENCLayer) else layer.weight
    if not _are_close(nn.functional.linear(x, weight), out, 30 * eps):
        weight = _outputs_for_units(layer, sample)
        if not _are_close(nn.functional.linear(x.double(), weight), out, 3 * eps**0.5):
            raise _not_linear(layer)
    rows = weight.double().square().sum(1)
    return UsedWeight(rows, rows * math.prod(sample[1:-1]))


def _outputs_for_units(layer: nn.Linear, sample: tuple[int, ...]) -> Tensor:
    """Outputs for the unit vectors minus the output for zero, ``(out, in)``, float64."""
    columns, inputs = [], layer.in_features
    between = (1,) * (len(sample) - 2)
    for units in torch.arange(inputs, device=layer.weight.device).split(max(1, _MAX_ELEMENTS // inputs)):
        x = nn.functional.one_hot(units, inputs).to(layer.weight.dtype).reshape(len(units), *between, inputs)
        columns.append((layer(x) - layer(torch.zeros_like(x))).double().reshape(len(units), -1))
    return torch.cat(columns).T


def _of_kernel(layer: ConvLayer, sample: tuple[int, ...], with_map: bool) -> UsedWeight:
    x = _random(layer, sample)
    ran, zero_ran = _Convolution(), _Convolution()
    with ran:
        out = layer(x)
    with zero_ran:
        zero = layer(torch.zeros_like(x))
    out = out - zero
    if ran.is_same_as(zero_ran) and _are_close(ran.linear_part(zero_ran), out, 30 * torch.finfo(out.dtype).eps):
        kernel = ran.weight.double()
        reads = _pixels_read(layer, sample, ran, zero_ran) if with_map else None
        by_map = None if reads is None else map_rows_sq_norm(kernel, reads)
        return UsedWeight(kernel.flatten(1).square().sum(1), by_map)
    return _of_jacobian(layer, x, out, zero, with_map)


class _Convolution(TorchDispatchMode):
    """Records the arguments of convolution operations; the properties are about the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "convolution":
            self.calls.append(args)
        return func(*args, **(kwargs or {}))

    @property
    def input(self) -> Tensor:
        return self.calls[0][0]

    @property
    def weight(self) -> Tensor:
        return self.calls[0][1]

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation, transposed, output padding, groups."""
        return tuple(self.calls[0][3:])

    def is_same_as(self, other: _Convolution) -> bool:
        """Whether each has recorded one convolution, with the same weight. If not, the weight depends on the input."""
        return len(self.calls) == len(other.calls) == 1 and torch.equal(self.weight, other.weight)

    def linear_part(self, zero: _Convolution) -> Tensor:
        """The convolution of its input minus its input in ``zero``, which may be a padding other than 0."""
        return torch.convolution(self.input - zero.input, self.weight, None, *self.geometry)


def _pixels_read(
    layer: ConvLayer, sample: tuple[int, ...], ran: _Convolution, zero: _Convolution
) -> list[Tensor] | None:
    """Argument ``reads`` of :func:`map_rows_sq_norm`: which input pixel each kernel element reads at each position.

    None if the input of the convolution does not consist of pixels of the layer's input.
    """
    size = sample[2:]
    marked = _Convolution()
    with marked:  # one sample for each dimension; the value of each pixel is its coordinate, from 1
        grid = torch.meshgrid(*(torch.arange(1, n + 1, device="cpu") for n in size), indexing="ij")
        x = torch.stack(grid)[:, None].expand(-1, sample[1], *size)
        layer(x.to(layer.weight.device, layer.weight.dtype))
    places = (marked.input - zero.input)[:, 0].double().cpu()
    dims = range(len(size))
    sources = [places[d].movedim(d, 0).reshape(places.shape[1 + d], -1).amax(1).round().long() - 1 for d in dims]
    if not _are_close(_take(_random(layer, sample), sources), ran.input - zero.input, 1e-6):
        return None
    stride, padding, dilation = ran.geometry[:3]
    reads = []
    for d, source in enumerate(sources):
        taps = ran.weight.shape[2 + d]
        outputs = (len(source) + 2 * padding[d] - dilation[d] * (taps - 1) - 1) // stride[d] + 1
        starts = torch.arange(outputs, device="cpu")[:, None] * stride[d] - padding[d]
        at = starts + torch.arange(taps, device="cpu") * dilation[d]
        inside = (at >= 0) & (at < len(source))
        reads.append(torch.where(inside, source[at.clamp(0, len(source) - 1)], -1))
    return reads


def _take(x: Tensor, sources: list[Tensor]) -> Tensor:
    """The pixels of ``x`` at the indices ``sources`` along each dimension, and 0 for the index -1."""
    for d, source in enumerate(sources):
        source = source.to(x.device)
        taken = x.index_select(2 + d, source.clamp(0, x.shape[2 + d] - 1))
        x = taken * (source >= 0).reshape([-1 if e == d else 1 for e in range(len(sources))])
    return x


def _of_jacobian(layer: ConvLayer, x: Tensor, out: Tensor, zero: Tensor, with_map: bool) -> UsedWeight:
    """Measure a layer that is more than one convolution (adapters, a factor after it) by rows of its Jacobian."""
    tolerance = 3 * torch.finfo(out.dtype).eps ** 0.5
    other = x.flip(1, 2)
    sum_of_two = layer(x + 2 * other) - zero
    if not _are_close(out + 2 * (layer(other) - zero), sum_of_two, tolerance):
        raise _not_linear(layer)
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    size = [3 * r + 2 * s for r, s in zip(reach, layer.stride, strict=True)]
    probe = x.new_zeros(1, x.shape[1], *size)
    grid = layer(probe).shape[2:]
    center = [n // 2 for n in grid]
    rows, beside = (_jacobian_rows(layer, probe, [place]) for place in (center, [n - 1 for n in center]))
    if not _are_close(rows, beside, tolerance):
        raise UnclearWeightError(f"{type(layer).__name__} uses different weights at different positions")
    by_map = None
    if with_map and out[0].numel() <= _MAX_OUTPUTS:
        places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in out.shape[2:])).reshape(-1, out.ndim - 2)
        by_map = _jacobian_rows(layer, x, places.tolist())
    return UsedWeight(rows, by_map)


def _jacobian_rows(layer: ConvLayer, x: Tensor, places: list[list[int]]) -> Tensor:
    """For each channel, the squared norms of the outputs' gradients, summed over ``places``; ``(out,)``, float64."""
    channels = layer(x).shape[1]
    wanted = [(channel, place) for channel in range(channels) for place in places]
    sums = torch.zeros(channels, dtype=torch.float64, device=x.device)
    count = max(1, _MAX_ELEMENTS // x.numel())
    for start in range(0, len(wanted), count):
        part = wanted[start : start + count]
        with torch.enable_grad():
            inputs = x.detach().repeat(len(part), *(1,) * (x.ndim - 1)).requires_grad_()
            out = layer(inputs)
            total = sum(out[(i, channel, *place)] for i, (channel, place) in enumerate(part))
            (grad,) = torch.autograd.grad(total, inputs)
        which = torch.tensor([channel for channel, _ in part], device=x.device)
        sums.index_add_(0, which, grad.double().flatten(1).square().sum(1))
    return sums
