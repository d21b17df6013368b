""":func:`to_enc`, which converts any network to an ENC network in place; its parts are in ``surgery``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .functional.checks import check_auto, check_model, check_type
from .functional.weights import check_alpha_option, check_variant, is_centered
from .layers import ENCLayer, enc_class, enc_layers
from .packed import pack_weights
from .surgery.audit import audit
from .surgery.conversion_report import ConversionReport, ConvertedLayer, warn_of_doubts
from .surgery.eligible import Evidence
from .surgery.fold import fold, guard_fusers
from .surgery.late_surgery import watch_optimizers
from .surgery.plain_weights import plain_weights
from .surgery.preserve import Plan, Preservation
from .surgery.projected import make_projected
from .surgery.recording import RecordError
from .surgery.selection import Selection, refuse_unfit, select_layers
from .surgery.startup_average import average_from_start

__all__ = ["audit", "enc_layers", "fold", "to_enc"]


def to_enc(
    model: nn.Module,
    variant: str = "ws",
    alpha: float | str = 1.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    post_norm: str | bool = "auto",
    preserve: bool | Tensor = False,
    example: Tensor | tuple | dict | None = None,
    how: str = "reparametrize",
    packed: bool | str = "auto",
) -> ConversionReport:
    """Turn the convolutions and linear layers of ``model`` into ENC layers, in place.

    Modules keep their identity, names, hooks, parameters and weight values; only their class changes. So references to
    them and checkpoints of the plain model stay valid. No random numbers are drawn. Convert before you build the
    optimizer and before you wrap the model (``DistributedDataParallel``), because conversion can add batch norms and
    learnable alphas. Layers that are ENC already are checked against the options and get a batch norm if they need
    one.

    Subclasses of the stock layers (mmcv's wrappers, timm's ``Conv2dSame``, ...) are converted if they use their weight
    as it is. Subclasses that normalise it themselves stay plain, and the report gives the reason.

    Args:
        model: Any ``nn.Module`` of mmpretrain, timm or plain torch, or a single layer.
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of every effective weight, a positive number or ``'learnable'``.
        include: Convert only layers that match one of these patterns; None: all. A pattern is a qualified name
            (``'backbone.layer1'`` includes everything below it) or a shell-style glob (``'*.downsample.*'``).
        exclude: Leave out layers that match one of these patterns.
        post_norm: Which layers get a batch norm on their output. ``'auto'``: each linear layer, and each convolution
            that acts as one (in squeeze-and-excitation blocks, as a classifier), unless a batch norm follows it
            directly; the paper needs these. True: every layer. False: none.
        preserve: Keep the function of a trained network in eval mode: the batch norms behind the layers absorb the
            change of scale, so that ``'fro'`` and ``'wn'`` change outputs only by rounding. ``'ws'`` and
            ``'centered_fro'`` remove means too; the resulting change of the outputs is measured, reported and warned
            about. This runs the network once more: on ``example`` (True), or on the batch given here.
        example: A batch for the network: a tensor, a tuple of positional or a dict of keyword arguments. The network
            runs on it once, in eval mode and without side effects, to see which layers are called, what else reads
            their weights, and which norms read their outputs. None: a batch is generated (only shapes are computed, so
            it costs little); the report names the layers that were not reached.
        how: ``'reparametrize'``: each layer computes with its effective weight. ``'project'``: after each step, the
            optimizer projects the weights themselves onto the constraint set; layers stay stock layers, apart from
            added batch norms, and parameter groups have to come from :func:`enc_plugin.param_groups_enc`.
        packed: Whether a forward pass of the model computes the weights of all layers together, which on a GPU saves
            most of their cost. ``'auto'``: on CUDA devices. See :func:`enc_plugin.packed.pack_weights`.

    Returns:
        The report: each ENC layer, its variant and whether it has a post-norm, and the layers that stay plain.

    Raises:
        ValueError: If an option is unknown, a pattern matches no layer, a layer cannot be normalised (a row of one
            element, a constant row), a layer is already ENC with another variant or alpha, the network does not run on
            ``example``, ``preserve`` finds a layer without a batch norm that can absorb its scale, or the model is
            already wrapped for distributed training and would get new parameters. The model is then unchanged.
        TypeError: If an argument has the wrong type.

    Warns:
        NoEffectWarning: If there is no layer to convert.
        UserWarning: If ``preserve`` could not keep the outputs, the network could not be run, layers are frozen (not
            with ``preserve``), or layers have no norm behind them (not with ``post_norm=False``).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> report = to_enc(model)
        >>> len(report), report.num_post_norms
        (2, 1)
    """
    check_model(model)
    check_variant(variant)
    check_alpha_option(alpha)
    check_auto("post_norm", post_norm)
    check_type("preserve", preserve, (bool, Tensor), "True, False or a batch of inputs")
    _check_how(how, alpha, preserve)
    check_auto("packed", packed)
    check_type("example", example, (Tensor, tuple, dict, type(None)), "a batch, a tuple or dict of arguments, or None")

    evidence = _look_at(model, example, preserve)
    chosen = select_layers(model, evidence, include, exclude, post_norm)
    refuse_unfit(model, chosen, variant, alpha, how)
    plan = None if preserve is False else _plan(model, chosen, evidence)

    frozen = chosen.frozen if how == "reparametrize" else []  # a projection of frozen weights is refused later
    gaining = [name for name, layer in chosen.layers.items() if chosen.gains_parameters(layer, alpha)]
    layers = {x: _convert(layer, variant, alpha, layer in chosen.needs_norm) for x, layer in chosen.layers.items()}
    converted = [ConvertedLayer.of(name, layer) for name, layer in layers.items()]
    watch_optimizers((name, layers[name]) for name in gaining)
    if how == "project":
        for layer in layers.values():
            make_projected(layer)
    guard_fusers(model)
    if layers:
        average_from_start(model)
        if how == "reparametrize":
            pack_weights(model, packed)

    report = ConversionReport(
        converted,
        plain_weights(model, chosen.problems),
        _keep_function(plan, variant),
        [name for name in evidence.without_norm(_normed(model)) if name in layers],
        {name: why for name, why in evidence.guessed().items() if name in layers},
        frozen,
    )
    warn_of_doubts(model, report, chosen, evidence.failure, post_norm)
    return report


def _check_how(how: str, alpha: float | str, preserve: bool | Tensor) -> None:
    if not isinstance(how, str) or how not in ("reparametrize", "project"):
        raise ValueError(f"how: expected 'reparametrize' or 'project', got {how!r}")
    if how == "project" and alpha == "learnable":
        raise ValueError("alpha: a learnable alpha needs how='reparametrize'; 'project' holds a constant one")
    if how == "project" and preserve is not False:
        raise ValueError("preserve: needs how='reparametrize', because 'project' changes no weight before training")


def _look_at(model: nn.Module, example: Tensor | tuple | dict | None, preserve: bool | Tensor) -> Evidence:
    """Run the network once, before anything is changed."""
    argument = "example"
    if isinstance(preserve, Tensor):
        argument, example = "preserve", preserve
    try:
        evidence = Evidence(model, example)
    except RecordError as error:
        raise ValueError(f"{argument}: {error}") from error
    if preserve is True and evidence.failure is not None:
        raise ValueError(
            f"preserve: the network has to run once to find the batch norm behind each layer, and {evidence.failure}: "
            "preserve=<Tensor> or example=..."
        )
    return evidence


def _convert(layer: nn.Module, variant: str, alpha: float | str, needs_norm: bool) -> ENCLayer:
    cls, converted = enc_class(type(layer)), cast(ENCLayer, layer)
    if cls is not None:
        # Changing the class keeps references, hooks and shared modules valid.
        layer.__class__ = cls
        converted._init_enc(variant, alpha, needs_norm)
    elif needs_norm and converted.enc_norm is None:
        converted.add_post_norm()
    return converted


def _normed(model: nn.Module) -> set[nn.Module]:
    return {layer for _, layer in enc_layers(model) if layer.enc_norm is not None}


def _plan(model: nn.Module, chosen: Selection, evidence: Evidence) -> Plan | None:
    # Weights that were loaded from an ENC checkpoint already compute the function of its network.
    plain = {name: layer for name, layer in chosen.layers.items() if not getattr(layer, "loaded_settings", None)}
    if not plain or evidence.trace is None:
        return None
    return Plan(model, plain, chosen.needs_norm | _normed(model), evidence.trace)


def _keep_function(plan: Plan | None, variant: str) -> Preservation | None:
    if plan is None:
        return None
    preserved = plan.apply()
    if not preserved.output_change < 1e-3:  # NaN too; rounding in float32 stays below 1e-4
        why = f"{variant!r} removes means, 'wn' and 'fro' do not"
        if not is_centered(variant):
            why = "the forward pass reads a weight, or a hook changes an output, in a way that to_enc cannot follow"
        warnings.warn(f"to_enc could not keep the function ({why}); {preserved}", UserWarning, stacklevel=3)
    return preserved
