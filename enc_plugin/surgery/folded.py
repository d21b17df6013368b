r"""Audit of folded weights ``W_eff``: in eval mode, a batch norm folds into the layer before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional.bounds import bound_chain
from ..layers import ENCLayer, StockLayer, batch_norm_affine
from ..table import first_few, format_table
from .plain_weights import own_matrices
from .recording import RecordError, record_forward
from .scale_paths import norms_that_fold
from .used_weight import UnclearWeightError, UsedWeight, used_weight


@dataclass(frozen=True)
class FoldedRow:
    """The norms of one layer with the batch norms after it folded in."""

    name: str  # the layer's, with " (call 2)" and so on if it runs again
    type: str
    norms: tuple[str, ...]  # names of the batch norms, in the order in which they run
    sq_norm: float  # ||W_eff||_F^2; for a convolution, of the kernel
    map_sq_norm: float | None  # squared norm of the linear map on the given inputs; None without inputs or if unknown


class FoldedAudit(list[FoldedRow]):
    """A list with a :class:`FoldedRow` for each call of a layer, in module order; ``print`` shows it as a table.

    A layer that is used several times is several layers of eq. 17.

    Attributes:
        unfolded: Names of the batch norms that do not fold into a layer (after a concatenation, pooling or activation).
            In the bound of eq. 17 each is a separate linear layer, which the chains below leave out.
        others: Weights of other modules (transposed convolutions, attention, LayerScale, group norms), by name, with
            the reason why they are not listed. The chains leave them out too.
        skipped: Names of the layers that did not run in the forward pass.
        unclear: Layers that are not a linear map of their input (an activation in the layer, a normalised input), by
            name, with the reason. Their norms are NaN, and so are the chains.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unfolded: list[str] = []
        self.others: dict[str, str] = {}
        self.skipped: list[str] = []
        self.unclear: dict[str, str] = {}

    @property
    def kernel_chain(self) -> dict[str, float]:
        """:func:`enc_plugin.functional.bound_chain` of the kernel norms, which weight decay and ENC control."""
        return bound_chain(row.sq_norm for row in self)

    @property
    def map_chain(self) -> dict[str, float] | None:
        """:func:`enc_plugin.functional.bound_chain` of the linear maps' norms (the bound of eq. 17), or None."""
        norms = [row.map_sq_norm for row in self if row.map_sq_norm is not None]
        return bound_chain(norms) if len(norms) == len(self) else None

    @property
    def slack(self) -> float:
        """AM-GM slack of the kernel norms, ``log_mean_power - log_product``: 0 if all norms are equal."""
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
            text.append(f"{len(self.unfolded)} batch norms do not fold into a layer: {first_few(self.unfolded)}")
        if self.others:
            text.append(f"{len(self.others)} weights of other modules are left out: {first_few([*self.others])}")
        if self.skipped:
            text.append(f"{len(self.skipped)} layers did not run: {first_few(self.skipped)}")
        text += [f"no norm: {name} ({why})" for name, why in self.unclear.items()]
        return "\n".join(text)


@torch.no_grad()
def audit_folded(model: nn.Module, inputs: Tensor | None = None) -> FoldedAudit:
    r"""Norms of the folded weights of a network, :math:`W_\mathrm{eff} = \mathrm{diag}(\gamma/\sigma) W`.

    A batch norm folds into a layer if it is the only reader of the layer's output. This is found in a forward pass in
    eval mode, not from names or the order of registration. The weight W that a layer really computes with is observed
    too: the effective weight of ENC layers, and the standardized, normalised or pruned weight of other layers.
    Post-norms are included. The model does not change.

    Args:
        model: Any ``nn.Module`` with ``Conv1d/2d/3d`` and ``Linear`` layers, ENC or plain.
        inputs: An input batch, for the norms of convolutions as linear maps on inputs of its size. None: a batch is
            generated to find the batch norms, and only kernel norms are listed.

    Returns:
        The table; norms are summed in float64.

    Raises:
        ValueError: If the network does not run on ``inputs``, or on any generated batch.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StockLayer)}
    # Submodules of a layer (its post-norm, or the layers of an adapter) are part of the layer.
    inside = {module for layer in layers.values() for module in layer.modules() if module is not layer}
    layers = {name: layer for name, layer in layers.items() if layer not in inside}
    if not layers:
        return FoldedAudit()
    try:
        trace = record_forward(model, inputs)
    except RecordError as error:
        raise ValueError(
            f"inputs: the network is run once to find the batch norm after each layer, but {error}"
        ) from error

    table = FoldedAudit()
    names = {module: name for name, module in model.named_modules()}
    folded: set[nn.Module] = set()
    for name, layer in layers.items():
        if layer not in trace.calls:
            table.skipped.append(name)
            continue
        norms = norms_that_fold(trace, layer)
        if isinstance(layer, ENCLayer) and layer.enc_norm is not None:
            norms.insert(0, layer.enc_norm)
        folded.update(norms)
        norm_names = tuple(names[norm] for norm in norms)
        for number, call in enumerate(trace.calls[layer], 1):
            try:
                if call.input is None:
                    raise UnclearWeightError("its input is not a tensor")
                used = used_weight(layer, call.input.shape, with_map=inputs is not None)
            except UnclearWeightError as error:
                table.unclear[name] = str(error)
                nan = torch.tensor(math.nan, device="cpu")  # without dimensions, to be combined with any device
                used = UsedWeight(nan, nan)
            sq_norm, map_sq_norm = _folded_norms(used, norms)
            map_sq_norm = None if inputs is None else map_sq_norm
            row_name = name if number == 1 else f"{name} (call {number})"
            table.append(FoldedRow(row_name, type(layer).__name__, norm_names, sq_norm, map_sq_norm))
    for name, module in model.named_modules():
        if module not in inside and not isinstance(module, (StockLayer, _BatchNorm)):
            # Attention uses the weights of modules that it does not call.
            table.others |= own_matrices(name, module) or (_own_vectors(name, module) if module in trace.calls else {})
    ran = {trace.norm_of(op) for op in trace.ops} - inside
    table.unfolded = [name for name, module in model.named_modules() if module in ran - folded]
    return table


def _own_vectors(name: str, module: nn.Module) -> dict[str, str]:
    """A module with parameters of its own that are no matrices, or with the weight of a frozen batch norm."""
    owns = [*module.parameters(recurse=False)] or isinstance(getattr(module, "weight", None), Tensor)
    return {name: f"{type(module).__name__} is no layer or batch norm"} if owns else {}


def _folded_norms(used: UsedWeight, norms: list[_BatchNorm]) -> tuple[float, float | None]:
    """Squared norms of a weight and of its linear map (None if unknown), with the batch norms ``norms`` folded in."""
    sq_gain = torch.ones_like(used.rows)
    for norm in norms:
        sq_gain = sq_gain * batch_norm_affine(norm)[0].square()
    map_sq_norm = None if used.map_rows is None else (used.map_rows * sq_gain).sum().item()
    return (used.rows * sq_gain).sum().item(), map_sq_norm
