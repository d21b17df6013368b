"""Keeping a trained network's function under ENC: the scale that a layer loses goes into the batch norm behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .functional.weights import is_centered, num_rows
from .layers import ENCLayer

# Operators that pass a positive factor per channel on, channel by channel. Pooling pads with zeros or not at all.
_HOMOGENEOUS = {
    "relu",
    "relu_",
    "leaky_relu",
    "leaky_relu_",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "mean",
    "native_dropout",
    "clone",
    "detach",
    "_to_copy",
    "view",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
}

_Channels = tuple[tuple[ENCLayer | None, int], ...]  # who wrote which channels, in channel order


@dataclass(frozen=True)
class Preservation:
    """What keeping the function came to.

    Attributes:
        output_change: Relative change of the outputs in eval mode, ``||new - old|| / ||old||``, on the example.
        removed_mean: Per layer the share of ``||W||_F^2`` that its variant removes with the mean; 0 for eq. 20 and 21.
    """

    output_change: float
    removed_mean: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"preserve: the outputs change by {self.output_change:.1e} (relative, eval mode, on the example)"
        if any(self.removed_mean.values()):
            name = max(self.removed_mean, key=self.removed_mean.__getitem__)
            average = sum(self.removed_mean.values()) / len(self.removed_mean)
            text += (
                f"; the removed means are {average:.2%} of ||W||^2 on average, at most {self.removed_mean[name]:.2%} "
                f"({name})"
            )
        return text


class Plan:
    """Where the scale of every layer of ``model`` can go, found by running the network once in eval mode.

    Args:
        model: The network, ENC or not yet; it is left as it was.
        layers: The layers that are (or will be) ENC, by name.
        owns_norm: The layers that have a post-norm of their own, which takes the scale.
        example: An input batch; True: one made up for the first layer.

    Raises:
        ValueError: If the network does not run on the example, or the output of a layer reaches something other than
            batch norms with running statistics; the layer and the operator are named.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], owns_norm: set[nn.Module], example):
        self.model, self.layers, self.owns_norm = model, layers, owns_norm
        self.example = _make_example(layers) if example is True else example
        flow = _Flow({layer for layer in layers.values() if layer not in owns_norm})
        with _plain_forward(layers.values()), _eval_mode(model), flow.watching(model):
            try:
                outputs = model(self.example)
            except Exception as error:
                raise ValueError(
                    "preserve: the network is run once to find the batch norm behind each layer, and does not run on "
                    f"{'a made-up input' if example is True else 'the example'} of shape "
                    f"{tuple(getattr(self.example, 'shape', ()))} ({error}); pass a batch it takes: preserve=<Tensor>"
                ) from error
        flow.finish(outputs)
        self.outputs = _flat(outputs)
        self.readers = flow.readers
        problems = [f"{name!r} ({flow.leaks[layer]})" for name, layer in layers.items() if layer in flow.leaks]
        if problems:
            shown = ", ".join(problems[:5]) + (", ..." if len(problems) > 5 else "")
            raise ValueError(
                f"preserve: the scale of {len(problems)} layer(s) cannot go into a batch norm: {shown}; leave them "
                "plain (exclude=...), or give them a batch norm of their own (post_norm=True)"
            )

    @torch.no_grad()
    def apply(self) -> Preservation:
        """Move the scales, once the layers are ENC, and measure what has changed."""
        removed = {}
        for name, layer in self.layers.items():
            scale, removed[name] = _row_scale(layer)
            if layer.norm is not None:
                _fill_post_norm(layer, scale)
            else:
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias.double() * scale)
                for norm, start in self.readers.get(layer, ()):
                    _absorb(norm, slice(start, start + len(scale)), scale)
            layer.holds_plain_weight = False
        with _eval_mode(self.model):
            outputs = _flat(self.model(self.example))
        change = (outputs - self.outputs).norm() / self.outputs.norm()
        return Preservation(change.item(), removed)


def _row_scale(layer: ENCLayer) -> tuple[Tensor, float]:
    """``(m,)`` factors s in ``What_j = s_j (W_j - mean)``, and the mean's share of ``||W||^2``."""
    rows = num_rows(layer.weight, layer.variant)
    w = layer.weight.double().reshape(rows, -1)
    centered = w - w.mean(1, keepdim=True) if is_centered(layer.variant) else w
    what = layer.effective_weight.double().reshape(rows, -1)
    scale = what.norm(dim=1) / centered.norm(dim=1)
    share = (1 - centered.square().sum() / w.square().sum()).clamp(min=0).item()
    return scale.expand(layer.weight.shape[0]), share if is_centered(layer.variant) else 0.0


def _absorb(norm: _BatchNorm, channels: slice, scale: Tensor) -> None:
    """Let ``norm`` give the same outputs in eval mode for inputs that have become ``scale`` times what they were."""
    var = norm.running_var[channels].double()
    new_var = scale.square() * var
    if norm.weight is not None:
        # The statistics become those that training will find; the gain takes what eps does to small variances.
        gain = ((new_var + norm.eps) / (var + norm.eps)).sqrt() / scale
        norm.weight[channels] = (norm.weight[channels].double() * gain).to(norm.weight.dtype)
    else:
        new_var = (scale.square() * (var + norm.eps) - norm.eps).clamp(min=0)
    norm.running_var[channels] = new_var.to(norm.running_var.dtype)
    norm.running_mean[channels] = (norm.running_mean[channels].double() * scale).to(norm.running_mean.dtype)


def _fill_post_norm(layer: ENCLayer, scale: Tensor) -> None:
    """Let the post-norm undo ``scale`` in eval mode; its statistics are those of white inputs of unit variance."""
    norm = layer.norm
    var = layer.effective_weight.double().flatten(1).square().sum(1)
    bias = torch.zeros_like(var) if layer.bias is None else layer.bias.double()
    norm.running_mean.copy_(bias)
    norm.running_var.copy_(var)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() / scale)
    norm.bias.copy_(bias)


class _Flow(TorchDispatchMode):
    """Follows the channels of the watched layers through a forward pass, up to the batch norms that read them."""

    def __init__(self, layers: set[nn.Module]):
        super().__init__()
        self.watched = layers
        self.leaks: dict[nn.Module, str] = {}
        self.readers: dict[nn.Module, list[tuple[_BatchNorm, int]]] = {}
        self._channels: dict[
            int, tuple[Tensor, _Channels]
        ] = {}  # by id; the tensor is kept so that the id stays its own
        self._read: dict[_BatchNorm, set[_Channels]] = {}
        self._inside_norm = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hook the layers and batch norms of ``model`` while the context lasts."""
        hooks = []
        for module in model.modules():
            if module in self.watched:
                hooks.append(module.register_forward_hook(self._after_layer))
            elif isinstance(module, _BatchNorm):
                hooks.append(module.register_forward_pre_hook(self._before_norm))
                hooks.append(module.register_forward_hook(self._after_norm))
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, outputs) -> None:
        """Turn what was seen into :attr:`readers` and :attr:`leaks`."""
        for tensor in tree_leaves(outputs):
            self._leak(self._of(tensor), "it is an output of the network")
        for norm, inputs in self._read.items():
            for channels in inputs:
                if len(inputs) > 1:
                    self._leak(channels, "its batch norm serves several places")
                start = 0
                for layer, count in channels:
                    if layer is not None:
                        self.readers.setdefault(layer, []).append((norm, start))
                    start += count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [] if self._inside_norm else [t for t in tree_leaves((args, kwargs)) if self._of(t)]
        if not inputs:
            return out
        first = out[0] if isinstance(out, (tuple, list)) else out
        if name == "cat" and isinstance(first, Tensor) and first.ndim > 1:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim % first.ndim == 1:
                parts = [self._of(t) or ((None, t.shape[1]),) for t in args[0]]
                self._write(first, tuple(segment for part in parts for segment in part))
                return out
        same_channels = isinstance(first, Tensor) and first.ndim > 1 and first.shape[:2] == inputs[0].shape[:2]
        if name in _HOMOGENEOUS and same_channels:
            self._write(first, self._of(inputs[0]))
            return out
        for tensor in inputs:
            self._leak(self._of(tensor), f"its output goes into {name!r}")
        return out

    def _of(self, tensor) -> _Channels:
        return self._channels.get(id(tensor), (None, ()))[1] if isinstance(tensor, Tensor) else ()

    def _write(self, tensor: Tensor, channels: _Channels) -> None:
        self._channels[id(tensor)] = (tensor, channels)

    def _leak(self, channels: _Channels, why: str) -> None:
        for layer, _ in channels:
            if layer is not None:
                self.leaks.setdefault(layer, why)

    def _after_layer(self, layer: nn.Module, args, out: Tensor) -> None:
        dim = 1 if out.ndim > 1 and out.shape[1] == layer.weight.shape[0] else None
        if dim is None or (isinstance(layer, nn.Linear) and out.ndim != 2):
            self._channels.pop(id(out), None)
            self.leaks.setdefault(layer, f"its output has shape {tuple(out.shape)}")
        else:
            self._write(out, ((layer, out.shape[1]),))

    def _before_norm(self, norm: _BatchNorm, args) -> None:
        channels = self._of(args[0])
        if any(layer is not None for layer, _ in channels) and norm.running_mean is None:
            self._leak(channels, "its batch norm keeps no running statistics")
        self._read.setdefault(norm, set()).add(channels)
        self._inside_norm = True

    def _after_norm(self, norm: _BatchNorm, args, out: Tensor) -> None:
        self._inside_norm = False


@contextmanager
def _plain_forward(layers) -> Iterator[None]:
    """Let layers that are ENC already compute with W while the context lasts: the network that they came from."""
    enc = {layer: type(layer) for layer in layers if isinstance(layer, ENCLayer)}
    for layer in enc:
        layer.__class__ = layer.plain_class
    try:
        yield
    finally:
        for layer, own in enc.items():
            layer.__class__ = own


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _make_example(layers: dict[str, nn.Module]) -> Tensor:
    """Noise of the shape that the first layer takes: two pictures of 224 x 224 for a 2-D convolution."""
    first = next(iter(layers.values()))
    if isinstance(first, nn.Conv2d):
        shape = (2, first.in_channels, 224, 224)
    elif isinstance(first, nn.Linear):
        shape = (2, first.in_features)
    else:
        raise ValueError(
            f"preserve: the input of a network that starts with {type(first).__name__} cannot be made up; "
            "pass a batch that it takes: preserve=<Tensor>"
        )
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    noise = torch.randn(math.prod(shape), generator=generator).view(shape)
    return noise.to(first.weight.device, first.weight.dtype)


def _flat(outputs) -> Tensor:
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.detach().double().flatten() for t in tensors])
