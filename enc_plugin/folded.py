r"""The weights that the bound is about: at test time a batch norm folds into the layer in front of it, ``W_eff``."""

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

from ._table import format_table
from .functional.bounds import bound_chain, conv_map_sq_norm
from .layers import ENC_LAYERS, ENCLayer, batch_norm_affine
from .preserve import _eval_mode

_LAYERS = tuple(ENC_LAYERS)


@dataclass(frozen=True)
class FoldedRow:
    """One layer with the batch norms behind it folded in."""

    name: str
    type: str
    norms: tuple[str, ...]  # names of the batch norms, in the order in which they run
    sq_norm: float  # ||W_eff||_F^2, of the kernel for a convolution
    map_sq_norm: (
        float | None
    )  # of the linear map on the given inputs; None: not asked for, or padding is not with zeros


class FoldedAudit(list[FoldedRow]):
    """Table of :class:`FoldedRow`, a row for each layer that ran, in module order; ``print`` it.

    Attributes:
        unfolded: Batch norms that fold into no layer (behind a concatenation, a pooling, an activation), by name. Each
            is a linear layer of its own in eq. 17, which the chains below leave out.
        skipped: Layers that the forward pass did not reach, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unfolded: list[str] = []
        self.skipped: list[str] = []

    @property
    def kernel_chain(self) -> dict[str, float]:
        """:func:`enc_plugin.functional.bound_chain` of the kernels' norms, those that weight decay and ENC see."""
        return bound_chain(row.sq_norm for row in self)

    @property
    def map_chain(self) -> dict[str, float] | None:
        """:func:`enc_plugin.functional.bound_chain` of the linear maps' norms, those of eq. 17; None without inputs."""
        norms = [row.map_sq_norm for row in self]
        return None if None in norms else bound_chain(norms)

    @property
    def slack(self) -> float:
        """Logarithm of mean power over product of the kernels' norms: 0 where all are equal, as under ENC's eq. 19."""
        return self.kernel_chain["log_mean_power"] - self.kernel_chain["log_product"]

    @property
    def map_slack(self) -> float | None:
        """:attr:`slack` of the linear maps' norms; None without inputs."""
        chain = self.map_chain
        return None if chain is None else chain["log_mean_power"] - chain["log_product"]

    def __str__(self) -> str:
        with_maps = any(row.map_sq_norm is not None for row in self)
        rows = []
        for row in self:
            cells = [row.name, row.type, ", ".join(row.norms) or "-", f"{row.sq_norm:.6g}"]
            rows.append([*cells, "-" if row.map_sq_norm is None else f"{row.map_sq_norm:.6g}"] if with_maps else cells)
        head = ["layer", "type", "folded batch norms", "||W_eff||^2", "map ||W_eff||^2"]
        text = [format_table(head if with_maps else head[:4], rows)]
        if self:
            text.append(f"AM-GM slack, log mean power - log product: {self.slack:.4g} (kernels)")
            if self.map_slack is not None:
                text[-1] += f", {self.map_slack:.4g} (linear maps)"
        if self.unfolded:
            text.append(f"{len(self.unfolded)} batch norms fold into no layer: {_shorten(self.unfolded)}")
        if self.skipped:
            text.append(f"{len(self.skipped)} layers did not run: {_shorten(self.skipped)}")
        return "\n".join(text)


@torch.no_grad()
def audit_folded(model: nn.Module, inputs: Tensor | None = None) -> FoldedAudit:
    r"""Norms of the weights that a network has at test time, :math:`W_\mathrm{eff} = \mathrm{diag}(\gamma/\sigma) W`.

    A batch norm folds into a layer if it reads the layer's output and nothing else does: found by running the network
    once in eval mode, so that neither names nor the order of registration matter. ENC layers count with their effective
    weight, post-norms included. The model is only read.

    Args:
        model: Any ``nn.Module`` with ``Conv1d/2d/3d`` and ``Linear`` layers, ENC or plain.
        inputs: A batch that the model takes, for the norms of convolutions as linear maps on inputs of its size. None:
            a batch is made up to find the batch norms, and kernel norms alone are listed.

    Returns:
        The table; norms are summed in float64.

    Raises:
        ValueError: If the network does not run on a batch that was made up for it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    flow = _Flow(layers.values())
    with _eval_mode(model), flow.watching(model):
        batch = _example(layers) if inputs is None else inputs
        try:
            model(batch)
        except Exception as error:
            if inputs is not None:
                raise
            raise ValueError(
                "inputs: the network is run once to find the batch norm behind each layer, and does not run on a "
                f"made-up input of shape {tuple(batch.shape)} ({error}); pass a batch that it takes"
            ) from error

    table = FoldedAudit()
    names = {module: name for name, module in model.named_modules()}
    folded: set[nn.Module] = set()
    for name, layer in layers.items():
        if layer not in flow.calls:
            table.skipped.append(name)
            continue
        norms = flow.norms_behind(layer)
        weight = layer.effective_weight if isinstance(layer, ENCLayer) else layer.weight
        weight = weight.double()
        for norm in norms:
            gain, _ = batch_norm_affine(norm)
            weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
        sq_norm = weight.square().sum().item()
        map_sq_norm = None if inputs is None else _map_sq_norm(layer, weight, flow.calls[layer][0].input_shape)
        row = FoldedRow(name, type(layer).__name__, tuple(names[norm] for norm in norms), sq_norm, map_sq_norm)
        table.append(row)
        folded.update(norms)
    table.unfolded = [name for name, module in model.named_modules() if module in flow.norms - folded]
    return table


def _map_sq_norm(layer: nn.Module, weight: Tensor, shape: torch.Size) -> float | None:
    """Squared norm of the linear map that the layer is with ``weight``, on one sample of a batch of ``shape``."""
    if isinstance(layer, nn.Linear):
        return weight.square().sum().item() * math.prod(shape[1:-1])
    if layer.padding_mode != "zeros":
        return None  # other paddings read a pixel through several taps
    size = shape[-(weight.ndim - 2) :]
    options = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return conv_map_sq_norm(weight, size, **options).item()


def _example(layers: dict[str, nn.Module]) -> Tensor:
    """Zeros of the shape that the first layer takes, ``(2, C, 224, 224)`` for a 2-D convolution."""
    first = next(iter(layers.values()), None)
    if first is None:
        return torch.zeros(2, 1)
    spatial = [224] * (first.weight.ndim - 2) if first.weight.ndim < 5 else [32] * 3
    channels = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return first.weight.new_zeros(2, channels, *spatial)


@dataclass(eq=False)
class _Value:
    """A tensor that a layer or batch norm has put out, and what has read it."""

    tensor: Tensor  # kept, so that its id stays its own
    input_shape: torch.Size
    readers: list[tuple[_BatchNorm, _Value] | str] = field(default_factory=list)


class _Flow(TorchDispatchMode):
    """Records which operations and batch norms read the outputs of layers during a forward pass."""

    def __init__(self, layers):
        super().__init__()
        self.calls: dict[nn.Module, list[_Value]] = {}
        self.norms: set[_BatchNorm] = set()
        self._layers = set(layers)
        self._values: dict[int, _Value] = {}
        self._inside_norm = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hook layers and batch norms of ``model`` while the context lasts; post-norms belong to their ENC layer."""
        owned = {layer.norm for layer in self._layers if isinstance(layer, ENCLayer)}
        hooks = []
        for module in model.modules():
            if module in self._layers:
                hooks.append(module.register_forward_hook(self._after_layer))
            elif isinstance(module, _BatchNorm) and module not in owned:
                hooks.append(module.register_forward_pre_hook(self._before_norm))
                hooks.append(module.register_forward_hook(self._after_norm))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def norms_behind(self, layer: nn.Module) -> list[_BatchNorm]:
        """The batch norms that fold into ``layer``, nearest first; those of all its calls, or none."""
        own = [layer.norm] if isinstance(layer, ENCLayer) and layer.norm is not None else []
        chains = [self._chain(value) for value in self.calls[layer]]
        return own + (chains[0] if all(chain == chains[0] for chain in chains) else [])

    def _chain(self, value: _Value) -> list[_BatchNorm]:
        norms = []
        while len(value.readers) == 1 and not isinstance(value.readers[0], str):
            norm, value = value.readers[0]
            norms.append(norm)
        return norms

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._inside_norm:
            for tensor in tree_leaves((args, kwargs)):
                value = self._of(tensor)
                if value is not None:
                    value.readers.append(func.overloadpacket.__name__)
        return out

    def _of(self, tensor) -> _Value | None:
        return self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _after_layer(self, layer: nn.Module, args, out: Tensor) -> None:
        value = _Value(out, args[0].shape)
        self._values[id(out)] = value
        self.calls.setdefault(layer, []).append(value)

    def _before_norm(self, norm: _BatchNorm, args) -> None:
        self.norms.add(norm)
        self._inside_norm = True

    def _after_norm(self, norm: _BatchNorm, args, out: Tensor) -> None:
        self._inside_norm = False
        read, written = self._of(args[0]), _Value(out, args[0].shape)
        self._values[id(out)] = written
        if read is not None:
            read.readers.append((norm, written))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
