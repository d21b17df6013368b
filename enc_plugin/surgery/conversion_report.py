"""The report and the warnings of :func:`enc_plugin.to_enc`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from ..layers import ENCLayer
from ..table import first_few, format_table
from .plain_weights import describe_plain_majority
from .preserve import Preservation
from .selection import Selection


class NoEffectWarning(UserWarning):
    """Conversion or folding found no layer to change."""


class FrozenWarning(UserWarning):
    """Conversion changed the outputs of layers that training cannot adapt."""


@dataclass(frozen=True)
class ConvertedLayer:
    """One ENC layer of a converted model; ``adds_bias``: ``fold`` will add a bias to it."""

    name: str
    type: str
    variant: str
    alpha: float | str
    post_norm: bool
    adds_bias: bool

    @classmethod
    def of(cls, name: str, layer: ENCLayer) -> ConvertedLayer:
        """Describe an ENC layer."""
        adds_bias = layer.enc_norm is not None and layer.bias is None
        return cls(name, type(layer).__name__, **layer.enc_settings, adds_bias=adds_bias)


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """Result of :func:`to_enc`. ``print(report)`` shows one line, ``print(report.table)`` shows every layer.

    Attributes:
        layers: The ENC layers, in module order.
        skipped: Layers and other owners of a plain weight, by name, with the reason.
        preserved: How well ``preserve`` kept the function, or None.
        without_norm: Names of the ENC layers with no norm that restores the scale before the next weight or the
            output of the network.
        guessed: ENC layers that did not run in the recorded forward pass, by name, with the assumption about them.
        frozen: Names of the layers that were frozen when they were converted.
    """

    layers: list[ConvertedLayer]
    skipped: dict[str, str]
    preserved: Preservation | None
    without_norm: list[str]
    guessed: dict[str, str]
    frozen: list[str]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_post_norms(self) -> int:
        """Number of ENC layers with a post-norm."""
        return sum(layer.post_norm for layer in self.layers)

    def __str__(self) -> str:
        kinds = "; ".join(sorted({f"{layer.variant}, alpha {layer.alpha}" for layer in self.layers}))
        parts = [f"{len(self)} ENC layers"]
        if self.layers:
            parts[0] += f" ({kinds}), {self.num_post_norms} with an added batch norm"
        if self.skipped:
            parts.append(f"{len(self.skipped)} weights stay plain")
        if self.guessed:
            parts.append(f"{len(self.guessed)} layers did not run in the recorded forward pass")
        if self.without_norm:
            parts.append(f"{len(self.without_norm)} have no norm after them")
        if self.preserved is not None:
            parts.append(f"{self.preserved}")
        return "; ".join(parts)

    __repr__ = __str__

    @property
    def table(self) -> str:
        """A table of all ENC layers, then one line for each plain weight, each guess and each layer without a norm."""
        rows = [(x.name, x.type, x.variant, f"{x.alpha}", "yes" if x.post_norm else "") for x in self.layers]
        lines = [format_table(("layer", "type", "variant", "alpha", "post-norm"), rows)]
        lines += [f"plain: {name} ({why})" for name, why in self.skipped.items()]
        added = [layer.name for layer in self.layers if layer.adds_bias]
        if added:
            lines.append(f"folding adds a bias, which the stock layers do not have, to: {', '.join(added)}")
        lines += [f"guessed: {name} ({why})" for name, why in self.guessed.items()]
        if self.without_norm:
            lines.append(f"without a norm after them: {', '.join(self.without_norm)}")
        if self.preserved is not None:
            lines.append(f"{self.preserved}")
        return "\n".join(lines)


def warn_of_doubts(
    model: nn.Module, report: ConversionReport, chosen: Selection, failure: str | None, post_norm: str | bool
) -> None:
    """Warn about a doubtful conversion, at the caller of ``to_enc``; ``failure``: why the network did not run."""
    skipped = {name: why for name, why in report.skipped.items() if name in chosen.problems}
    majority = describe_plain_majority(model, skipped)
    if majority and report.layers:
        _warn_caller(f"to_enc: {majority}; report.skipped names them")
    if report.guessed and failure is not None:
        _warn_caller(
            f"to_enc could not run the network ({failure}: example=...). It assumed that no other module uses the "
            f"weights of the {len(report.guessed)} layers, and guessed which batch norms follow them"
        )
    if report.without_norm and post_norm is not False:
        names = report.without_norm
        _warn_caller(
            f"to_enc: {len(names)} of {len(report)} ENC layers have no norm after them, so their outputs stay as small "
            f"as their weights: {first_few(names)}. A network of such layers hardly trains; add a batch norm to each "
            "layer with post_norm=True, or leave them plain with exclude=[...]"
        )
    if report.frozen and report.preserved is None:
        _warn_caller(
            f"to_enc: {len(report.frozen)} of {len(report)} ENC layers are frozen: {first_few(report.frozen)}. The "
            "constraint changes their outputs, and training does not adapt them; keep their outputs with "
            "preserve=True, or leave them plain with exclude=[...] (no need to if their weights will be loaded, or "
            "follow trained ones, as in a momentum encoder; then let its buffers follow too, because added batch norms "
            "of frozen layers stay in eval mode)",
            FrozenWarning,
        )
    if not report.layers:
        left = " selected by include and exclude" if chosen.candidates else ""
        _warn_caller(
            f"to_enc changed nothing: {type(model).__name__} has no Conv1d/2d/3d or Linear layer{left}", NoEffectWarning
        )


def _warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn(text, category, stacklevel=4)
