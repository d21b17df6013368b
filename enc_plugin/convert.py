"""Surgery on whole models: :func:`to_enc` converts any ``nn.Module`` in place, :func:`audit` checks the constraint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .functional.weights import check_alpha, check_variant, is_centered, num_rows
from .layers import ENC_LAYERS, ENCLayer

# Squeeze-and-excitation blocks by their class names in mmpretrain, mmcv, timm and torchvision.
_SE_BLOCK = re.compile(r"^(Effective)?SE(Layer|Module|Block|Unit)|SqueezeExcit")


class NoEffectWarning(UserWarning):
    """Surgery found nothing to convert."""


@dataclass(frozen=True)
class ConvertedLayer:
    """One ENC layer of a converted model."""

    name: str
    type: str
    variant: str
    alpha: float | str
    post_norm: bool


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`to_enc` did: the ENC layers in module order, and what keeps a plain weight and why."""

    layers: list[ConvertedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_post_norms(self) -> int:
        """Number of ENC layers that own a batch norm."""
        return sum(layer.post_norm for layer in self.layers)

    def __str__(self) -> str:
        rows = [(x.name, x.type, x.variant, f"{x.alpha}", "yes" if x.post_norm else "") for x in self.layers]
        text = format_table(("layer", "type", "variant", "alpha", "post-norm"), rows)
        return "\n".join([text, *(f"plain: {name} ({why})" for name, why in self.skipped.items())])


def to_enc(
    model: nn.Module,
    variant: str = "ws",
    alpha: float | str = 1.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    post_norm: str | bool = "auto",
) -> ConversionReport:
    """Turn the convolutions and linear layers of ``model`` into ENC layers, in place.

    Modules keep their identity, names, hooks, parameters and weight values (only their class changes), so that
    optimizers, references and checkpoints of the plain model stay valid. No random numbers are drawn.
    Layers that are ENC already are checked against the options and get a post-norm where one is due.

    Args:
        model: Any ``nn.Module``: of mmpretrain, timm, or plain torch; a single layer too.
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of every effective weight, a positive number or ``'learnable'``.
        include: Convert only layers that match one of these patterns; None: all. A pattern is a qualified name
            (``'backbone.layer1'`` takes in everything below it) or a shell-style glob (``'*.downsample.*'``).
        exclude: Leave out layers that match one of these patterns.
        post_norm: ``'auto'`` gives a batch norm of its own to every layer that the paper must give one: each linear
            layer and the convolutions of squeeze-and-excitation blocks, unless a batch norm follows at once.
            True: every layer; False: none.

    Returns:
        The report: each ENC layer with its variant and whether it has a post-norm, and what stays plain.

    Raises:
        ValueError: If an option is unknown, a pattern matches no layer, a layer cannot be normalised (a row of one
            element, a constant row), or a layer is ENC already with another variant or alpha. The model is then
            unchanged.

    Warns:
        NoEffectWarning: If there is no layer to convert.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> report = to_enc(model)
        >>> len(report), report.num_post_norms
        (2, 1)
    """
    check_variant(variant)
    if alpha != "learnable":
        if isinstance(alpha, str):
            raise ValueError(f"alpha: expected a positive number or 'learnable', got {alpha!r}")
        check_alpha(alpha)
    if post_norm not in ("auto", True, False):
        raise ValueError(f"post_norm: expected 'auto', True or False, got {post_norm!r}")

    names = [name for name, module in model.named_modules() if _is_layer(module)]
    selected = _select(names, include, exclude)
    modules = dict(model.named_modules())
    wants_norm = _layers_without_batch_norm(model) if post_norm == "auto" else None

    # Check everything before the first change: a refused model is left as it was.
    for name in selected:
        module = modules[name]
        if isinstance(module, ENCLayer):
            _check_same_options(name, module, variant, alpha)
        elif module.weight.device.type != "meta":
            check_normalizable(name, module.weight, variant)

    report = ConversionReport(skipped=_plain_weights(model, selected))
    for name in selected:
        module = modules[name]
        needs_norm = module in wants_norm if wants_norm is not None else bool(post_norm)
        if not isinstance(module, ENCLayer):
            # Changing the class keeps every reference, hook and shared module in place.
            module.__class__ = ENC_LAYERS[type(module)]
            module._init_enc(variant, alpha, needs_norm)
        elif needs_norm and module.norm is None:
            module.add_post_norm()
        report.layers.append(ConvertedLayer(name, type(module).__name__, variant, alpha, module.norm is not None))
    if not report.layers:
        warnings.warn(
            f"to_enc changed nothing: {type(model).__name__} has no Conv1d/2d/3d or Linear layer"
            + (" that include and exclude leave" if names else ""),
            NoEffectWarning,
            stacklevel=2,
        )
    return report


def enc_layers(model: nn.Module) -> Iterator[tuple[str, ENCLayer]]:
    """The ENC layers of ``model`` with their qualified names, each once, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ENCLayer))


def check_normalizable(name: str, weight: Tensor, variant: str) -> None:
    """Raise ``ValueError``, naming the layer and the way out, if ``variant`` cannot normalise ``weight``."""
    rows = weight.detach().reshape(num_rows(weight, variant), -1)
    if not rows.isfinite().all():
        raise ValueError(
            f"layer {name!r}: its weight holds NaN or Inf; start from a finite checkpoint or initialisation"
        )
    if not is_centered(variant):
        bad, what = ~rows.bool().any(1), "all zero"
    elif rows.shape[1] == 1:
        bad, what = rows.new_ones(rows.shape[0], dtype=torch.bool), "of one element"
    else:
        bad, what = rows.amax(1) == rows.amin(1), "constant"
    if bad.any():
        where = "its weight is" if rows.shape[0] == 1 else f"{int(bad.sum())} of its {rows.shape[0]} rows are"
        way_out = "initialise it with random values"
        if what == "of one element":
            way_out = "convert it with variant='wn' or 'fro'"
        raise ValueError(
            f"layer {name!r}: {where} {what}, which {variant!r} cannot normalise (0 / 0); "
            f"{way_out}, or leave it plain with exclude=[{name!r}]"
        )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, ENCLayer) or type(module) in ENC_LAYERS


def _select(names: list[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> list[str]:
    def matching(argument: str, patterns: str | Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)}
            if not hits:
                shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
                raise ValueError(f"{argument}: {pattern!r} matches no layer; the layers are {shown or '(none)'}")
            found |= hits
        return found

    kept = set(names) if include is None else matching("include", include)
    if exclude is not None:
        kept -= matching("exclude", exclude)
    return [name for name in names if name in kept]


def _layers_without_batch_norm(model: nn.Module) -> set[nn.Module]:
    """Linear layers and the convolutions of squeeze-and-excitation blocks that no batch norm follows at once."""
    followed: set[nn.Module] = set()
    for module in model.modules():
        children: Iterable[nn.Module] = module.children() if isinstance(module, nn.Sequential) else ()
        # mmcv's ConvModule runs convolution, norm and activation, whatever order they were registered in.
        if getattr(module, "with_norm", False) and hasattr(module, "conv"):
            children = (module.conv, module.norm)
        children = list(children)
        followed.update(a for a, b in zip(children, children[1:], strict=False) if isinstance(b, _BatchNorm))
    due: set[nn.Module] = {m for m in model.modules() if isinstance(m, nn.Linear)}
    for module in model.modules():
        if _SE_BLOCK.search(type(module).__name__):
            due.update(m for m in module.modules() if _is_layer(m))
    return due - followed


def _plain_weights(model: nn.Module, selected: list[str]) -> dict[str, str]:
    """Modules that hold a matrix-like weight of their own and are no ENC layers, with the reason."""
    plain = {}
    for name, module in model.named_modules():
        if name in selected or not any(p.ndim >= 2 for p in module.parameters(recurse=False)):
            continue
        if type(module) in ENC_LAYERS or isinstance(module, ENCLayer):
            plain[name] = "left out by include / exclude"
        else:
            plain[name] = f"{type(module).__name__} has no ENC layer"
    return plain


def _check_same_options(name: str, layer: ENCLayer, variant: str, alpha: float | str) -> None:
    own = "learnable" if layer.log_alpha is not None else layer.alpha
    if (layer.variant, own) != (variant, alpha):
        raise ValueError(
            f"layer {name!r} is ENC already with variant={layer.variant!r}, alpha={own!r}, but "
            f"variant={variant!r}, alpha={alpha!r} is asked for; make the two agree, or use exclude=[{name!r}]"
        )


@dataclass(frozen=True)
class AuditRow:
    """The constraint at one layer."""

    name: str
    type: str
    variant: str
    alpha: float
    sq_norm: float  # ||What||_F^2
    free_norm: float  # ||W||_F

    @property
    def deviation(self) -> float:
        r"""Relative deviation :math:`|\lVert\hat W\rVert_F^2 / \alpha - 1|`; NaN if the layer has no direction."""
        return abs(self.sq_norm / self.alpha - 1)


class Audit(list[AuditRow]):
    """Table of :class:`AuditRow`, a row for each ENC layer; ``print`` it, or read :attr:`max_deviation`."""

    @property
    def max_deviation(self) -> float:
        """Largest relative deviation from alpha: float32 rounding when all is well, NaN if any is; 0 without layers."""
        deviations = torch.tensor([0.0, *(row.deviation for row in self)])
        return deviations.max().item()  # torch's max, unlike Python's, passes NaN on

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
        head = ("layer", "type", "variant", "alpha", "||What||^2", "||W||", "deviation")
        return f"{format_table(head, rows)}\nlargest deviation from alpha: {self.max_deviation:.1e}"


@torch.no_grad()
def audit(model: nn.Module) -> Audit:
    r"""Check the constraint: :math:`\lVert\hat W\rVert_F^2`, :math:`\lVert W\rVert_F` and deviation, per ENC layer.

    Norms are summed in float64. The model is only read.

    Args:
        model: Any ``nn.Module``; layers that are not ENC have no row.

    Returns:
        The table, in module order.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = to_enc(model)
        >>> audit(model).max_deviation < 1e-6
        True
    """
    rows = Audit()
    for name, layer in enc_layers(model):
        rows.append(
            AuditRow(
                name,
                type(layer).__name__,
                layer.variant,
                float(layer.alpha),
                layer.effective_weight.double().square().sum().item(),
                layer.weight.double().square().sum().sqrt().item(),
            )
        )
    return rows


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain-text table with left-aligned, padded columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )
