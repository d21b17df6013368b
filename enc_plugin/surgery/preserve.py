"""Keeping the outputs of a trained network under ENC: the batch norm after a layer takes the scale that ENC removes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.buffers import kept_buffers
from ..functional.weights import is_centered, num_rows
from ..layers import ENCLayer, StockLayer, running_statistics
from ..table import first_few
from .example import with_values
from .recorder import tensors_in
from .restored import plain_forward, restored
from .scale_paths import Scales
from .trace import Trace


@dataclass(frozen=True)
class Preservation:
    """How well the outputs were kept.

    Attributes:
        output_change: Relative change of the outputs in eval mode, ``||new - old|| / ||old||``, on the example.
        removed_mean: For each layer, the share of ``||W||_F^2`` that the variant removes with the mean; 0 for ``'fro'``
            and ``'wn'``.
    """

    output_change: float
    removed_mean: dict[str, float]

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
    """Which batch norms can take the scale of each layer of ``model``.

    Args:
        model: The network, before or after conversion; it does not change.
        layers: The layers that are or will be ENC, by name.
        owns_norm: The layers with a post-norm, which takes the scale.
        trace: A recorded pass of the network.

    Raises:
        ValueError: If the output of a layer is read by something else than batch norms with running statistics. The
            message names the layer and the operation.
    """

    def __init__(self, model: nn.Module, layers: dict[str, StockLayer], owns_norm: set[nn.Module], trace: Trace):
        self.model, self.layers = model, layers
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError("preserve: the weights are on the meta device, so the network has no function yet")
        self.example = with_values(trace.example, model)
        scales = Scales(trace, [layer for layer in layers.values() if layer not in owns_norm])
        self.readers = scales.readers
        problems = [f"{name!r} ({scales.leaks[layer]})" for name, layer in layers.items() if layer in scales.leaks]
        if problems:
            raise ValueError(
                f"preserve: the scale of {len(problems)} layer(s) cannot go into a batch norm: {first_few(problems)}; "
                "leave them plain (exclude=...), or add a batch norm to them (post_norm=True)"
            )
        with plain_forward(layers.values()):
            self.outputs = self._run()

    def _run(self) -> Tensor:
        args, kwargs = self.example
        # All hooks, because one may change an output.
        with kept_buffers(self.model), restored(self.model, all_hooks=True), torch.no_grad():
            tensors = tensors_in(self.model(*args, **kwargs))
            return torch.cat([t.double().flatten() for t in tensors if t.is_floating_point()])

    @torch.no_grad()
    def apply(self) -> Preservation:
        """Move the scales after the layers were converted, and measure the change of the outputs."""
        removed = {}
        scaled = set()  # ids of biases, which layers with a tied weight may share
        for name, layer in self.layers.items():
            assert isinstance(layer, ENCLayer), "apply() must be called after the conversion"
            scale, removed[name] = _row_scale(layer)
            if layer.enc_norm is not None:
                _fill_post_norm(layer.enc_norm, layer, scale)
            else:
                if layer.bias is not None and id(layer.bias) not in scaled:
                    scaled.add(id(layer.bias))
                    layer.bias.copy_(layer.bias.double() * scale)
                for norm, positions, channels in self.readers.get(layer, ()):
                    _absorb(norm, positions.to(scale.device), scale[channels.to(scale.device)])
            layer.loaded_settings = layer.enc_settings
        outputs = self._run()
        change = (outputs - self.outputs).norm() / self.outputs.norm()
        return Preservation(change.item(), removed)


def _row_scale(layer: ENCLayer) -> tuple[Tensor, float]:
    """Factors s, ``(m,)``, in ``What_j = s_j (W_j - mean)``, and the share of the mean in ``||W||^2``."""
    rows = num_rows(layer.weight, layer.enc_variant)
    w = layer.weight.double().reshape(rows, -1)
    centered = w - w.mean(1, keepdim=True) if is_centered(layer.enc_variant) else w
    what = layer.effective_weight.double().reshape(rows, -1)
    scale = what.norm(dim=1) / centered.norm(dim=1)
    share = (1 - centered.square().sum() / w.square().sum()).clamp(min=0).item()
    return scale.expand(layer.weight.shape[0]), share if is_centered(layer.enc_variant) else 0.0


def _absorb(norm: _BatchNorm, channels: Tensor, scale: Tensor) -> None:
    """Change ``norm`` so that its outputs in eval mode do not change when its inputs are multiplied by ``scale``."""
    mean, running_var = running_statistics(norm)
    var = running_var[channels].double()
    new_var = scale.square() * var
    if norm.weight is not None:
        # The running statistics become those of the scaled inputs. The gain compensates for eps.
        gain = ((new_var + norm.eps) / (var + norm.eps)).sqrt() / scale
        norm.weight[channels] = (norm.weight[channels].double() * gain).to(norm.weight.dtype)
    else:
        new_var = (scale.square() * (var + norm.eps) - norm.eps).clamp(min=0)
    running_var[channels] = new_var.to(running_var.dtype)
    mean[channels] = (mean[channels].double() * scale).to(mean.dtype)


def _fill_post_norm(norm: _BatchNorm, layer: ENCLayer, scale: Tensor) -> None:
    """Make the post-norm undo ``scale`` in eval mode; its statistics are those for white input of unit variance."""
    mean, running_var = running_statistics(norm)
    var = layer.effective_weight.double().flatten(1).square().sum(1)
    bias = torch.zeros_like(var) if layer.bias is None else layer.bias.double()
    mean.copy_(bias)
    running_var.copy_(var)
    norm.weight.copy_((running_var.double() + norm.eps).sqrt() / scale)
    norm.bias.copy_(bias)
