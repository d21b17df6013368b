"""What :func:`enc_plugin.to_enc` says of what it did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import nn

from ..layers import ENCLayer
from ..table import first_few, format_table
from .plain_weights import describe_plain_majority
from .preserve import Preservation
from .selection import Selection


class NoEffectWarning(UserWarning):
    """Surgery found nothing to convert."""


@dataclass(frozen=True)
class ConvertedLayer:
    """One ENC layer of a converted model; ``fold`` gives it a bias that its stock layer lacks if ``adds_bias``."""

    name: str
    type: str
    variant: str
    alpha: float | str
    post_norm: bool
    adds_bias: bool = False

    @classmethod
    def of(cls, name: str, layer: ENCLayer) -> ConvertedLayer:
        """The row of an ENC layer."""
        adds_bias = layer.enc_norm is not None and layer.bias is None
        return cls(name, type(layer).__name__, **layer.enc_settings, adds_bias=adds_bias)


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """What :func:`to_enc` did. Printed, it is one line; ``print(report.table)`` shows every layer.

    Attributes:
        layers: The ENC layers, in module order.
        skipped: What keeps a plain weight, by name, with the reason.
        preserved: How well ``preserve`` kept the function, or None.
        without_norm: Names of the ENC layers whose scale no norm restores, in front of the next weight or of the
            network's end.
        guessed: ENC layers that were not seen at work, by name, with what is taken for granted about them.
    """

    layers: list[ConvertedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    preserved: Preservation | None = None
    without_norm: list[str] = field(default_factory=list)
    guessed: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_post_norms(self) -> int:
        """Number of ENC layers that own a batch norm."""
        return sum(layer.post_norm for layer in self.layers)

    def __str__(self) -> str:
        kinds = sorted({f"{layer.variant}, alpha {layer.alpha}" for layer in self.layers})
        text = f"{len(self)} ENC layers"
        text += f" ({'; '.join(kinds)}), {self.num_post_norms} with a batch norm of their own" if self.layers else ""
        text += f"; {len(self.skipped)} weights stay plain" if self.skipped else ""
        text += f"; {len(self.guessed)} layers were not seen at work" if self.guessed else ""
        text += f"; {len(self.without_norm)} have no norm behind them" if self.without_norm else ""
        return text if self.preserved is None else f"{text}; {self.preserved}"

    __repr__ = __str__

    @property
    def table(self) -> str:
        """All layers, a row each, and what stays plain, is guessed or has no norm behind it, a line each."""
        rows = [(x.name, x.type, x.variant, f"{x.alpha}", "yes" if x.post_norm else "") for x in self.layers]
        text = format_table(("layer", "type", "variant", "alpha", "post-norm"), rows)
        text = "\n".join([text, *(f"plain: {name} ({why})" for name, why in self.skipped.items())])
        added = [layer.name for layer in self.layers if layer.adds_bias]
        if added:
            text += f"\nget a bias when folded, which the stock layers lack: {', '.join(added)}"
        text = "\n".join([text, *(f"guessed: {name} ({why})" for name, why in self.guessed.items())])
        if self.without_norm:
            text += f"\nwithout a norm behind them: {', '.join(self.without_norm)}"
        return text if self.preserved is None else f"{text}\n{self.preserved}"


def warn_of_doubts(
    model: nn.Module, report: ConversionReport, chosen: Selection, failure: str | None, post_norm: str | bool
) -> None:
    """Warn of what makes a conversion doubtful, at the caller's caller; ``failure``: why the network did not run."""
    skipped = {name: why for name, why in report.skipped.items() if name in chosen.problems}
    majority = describe_plain_majority(model, skipped)
    if majority and report.layers:
        _warn_caller(f"to_enc: {majority}; report.skipped names them")
    if report.guessed and failure is not None:
        _warn_caller(
            f"to_enc did not see the network at work ({failure}: example=...). It took for granted that each of the "
            f"{len(report.guessed)} layers alone computes with its weight, and guessed which batch norms follow"
        )
    if report.without_norm and post_norm is not False:
        names = report.without_norm
        _warn_caller(
            f"to_enc: {len(names)} of {len(report)} ENC layers have no norm behind them, so that their outputs stay as "
            f"small as their weights: {first_few(names)}. A network of such layers hardly trains; give each layer a "
            "batch norm of its own with post_norm=True, or leave them plain with exclude=[...]"
        )
    if not report.layers:
        left = " that include and exclude leave" if chosen.candidates else ""
        _warn_caller(
            f"to_enc changed nothing: {type(model).__name__} has no Conv1d/2d/3d or Linear layer{left}", NoEffectWarning
        )


def _warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn(text, category, stacklevel=4)
