"""Audit of the constraint: norms of the effective weights, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional.checks import check_model, check_type
from ..layers import ENCLayer
from ..table import format_table
from .folded import FoldedAudit, audit_folded
from .projected import Projected, constrained_layers


@dataclass(frozen=True)
class AuditRow:
    """The norms of one ENC layer."""

    name: str
    type: str
    variant: str
    alpha: float
    sq_norm: float  # ||What||_F^2
    free_norm: float  # ||W||_F

    @property
    def deviation(self) -> float:
        r"""Relative deviation :math:`|\lVert\hat W\rVert_F^2 / \alpha - 1|`; NaN if the weight cannot be normalised."""
        return abs(self.sq_norm / self.alpha - 1)


class Audit(list[AuditRow]):
    """A list with an :class:`AuditRow` for each ENC layer; ``print`` shows it as a table."""

    @property
    def max_deviation(self) -> float:
        """Largest relative deviation from alpha; NaN if any is NaN, 0 without layers. Normally float32 rounding."""
        deviations = torch.tensor([0.0, *(row.deviation for row in self)], dtype=torch.float32, device="cpu")
        return deviations.max().item()  # torch's max propagates NaN, Python's does not

    def __str__(self) -> str:
        rows = [
            (
                r.name,
                r.type,
                r.variant,
                f"{r.alpha:.6g}",
                f"{r.sq_norm:.8f}",
                f"{r.free_norm:.4g}",
                f"{r.deviation:.1e}",
            )
            for r in self
        ]
        head = ("layer", "type", "variant", "alpha", "squared norm", "free norm", "deviation")
        return f"{format_table(head, rows)}\nlargest deviation from alpha: {self.max_deviation:.1e}"


@torch.no_grad()
def audit(model: nn.Module, folded: bool = False, inputs: Tensor | None = None) -> Audit | FoldedAudit:
    r"""List :math:`\lVert\hat W\rVert_F^2`, :math:`\lVert W\rVert_F` and the deviation from alpha for each ENC layer.

    Norms are summed in float64. The model does not change.

    Args:
        model: Any ``nn.Module``; plain layers are not listed.
        folded: List the norms of the folded weights instead, :math:`\mathrm{diag}(\gamma/\sigma) W`, which the bound
            of eq. 17 is about: every layer, ENC or plain, with the batch norms after it folded in, and the AM-GM slack.
        inputs: For ``folded``: an input batch of the model; adds the norms of the convolutions as linear maps.

    Returns:
        The table, in module order.

    Example:
        >>> import enc_plugin
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = enc_plugin.to_enc(model)
        >>> audit(model).max_deviation < 1e-6
        True
    """
    check_model(model)
    check_type("folded", folded, bool, "True or False")
    check_type("inputs", inputs, (Tensor, type(None)), "a batch of inputs or None")
    if folded:
        return audit_folded(model, inputs)
    return Audit(
        AuditRow(
            name,
            type(layer.layer if isinstance(layer, Projected) else layer).__name__,
            layer.enc_variant,
            float(layer.enc_alpha),
            layer.effective_weight.double().square().sum().item(),
            _free_norm(layer),
        )
        for name, layer in constrained_layers(model)
    )


def _free_norm(layer: ENCLayer | Projected) -> float:
    weight = layer.enc_free_weight.double()
    return (weight if layer.enc_kept is None else weight * layer.enc_kept).square().sum().sqrt().item()
