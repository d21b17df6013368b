"""Surgery on whole models: :func:`to_enc` converts any ``nn.Module`` in place, :func:`fold` undoes it for deployment,
:func:`audit` checks the constraint."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .functional.checks import check_type
from .functional.normalizable import check_all_normalizable, check_normalizable
from .functional.weights import check_alpha_option, check_variant, is_centered
from .layers import POST_NORM_KEYS, ENCLayer, enc_class, lacks_attribute
from .layers.reparametrized import copies_of_results
from .surgery.eligible import Evidence, refuse_weights_read_elsewhere
from .surgery.folded import FoldedAudit, audit_folded
from .surgery.late_surgery import refuse_wrapped, watch_optimizers
from .surgery.plain_weights import describe_plain_majority, plain_weights
from .surgery.preserve import Plan, Preservation
from .surgery.projected import Projected, constrained_layers, make_projected, projection_of, unmark
from .surgery.startup_average import average_from_start, drop_averages
from .surgery.subclass_trial import post_norm_problem, weight_problem
from .surgery.trace import RecordError, record
from .table import format_table


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


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`to_enc` did.

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
) -> ConversionReport:
    """Turn the convolutions and linear layers of ``model`` into ENC layers, in place.

    Modules keep their identity, names, hooks, parameters and weight values (only their class changes), so that
    references and checkpoints of the plain model stay valid. No random numbers are drawn. Make the optimizer, and wrap
    the model (``DistributedDataParallel``), afterwards: older ones do not know the batch norms and learnable alphas
    that are added.
    Layers that are ENC already are checked against the options and get a post-norm where one is due.

    Subclasses of the stock layers (mmcv's wrappers, timm's ``Conv2dSame``, ...) are converted if they compute with
    their weight as it is. They stay plain, with the reason in the report, if they normalise it themselves.

    Args:
        model: Any ``nn.Module``: of mmpretrain, timm, or plain torch; a single layer too.
        variant: ``'ws'`` (eq. 22), ``'wn'`` (21), ``'fro'`` (20) or ``'centered_fro'`` (23).
        alpha: Squared Frobenius norm of every effective weight, a positive number or ``'learnable'``.
        include: Convert only layers that match one of these patterns; None: all. A pattern is a qualified name
            (``'backbone.layer1'`` takes in everything below it) or a shell-style glob (``'*.downsample.*'``).
        exclude: Leave out layers that match one of these patterns.
        post_norm: ``'auto'`` gives a batch norm of its own to every layer that the paper must give one: each linear
            layer and each convolution that works as one (in squeeze-and-excitation blocks, as a classifier), unless a
            batch norm reads it at once. True: every layer; False: none.
        preserve: Keep the function of a trained network (in eval mode): what the layers lose in scale goes into the
            batch norms behind them, so that ``'fro'`` and ``'wn'`` change outputs by rounding alone. ``'ws'`` and
            ``'centered_fro'`` remove means too; by how much that changes the outputs is measured, reported and warned
            of. The network runs once more for this: on the example (True), or on the batch given.
        example: A batch that the network takes: a tensor, a tuple of positional or a dict of keyword arguments. The
            network runs on it once, in eval mode and without a trace, to see which layers are called, who else reads
            their weights and which norms read their outputs. None: a batch is made up (of shapes alone, so that it
            costs little); the report names the layers that were not seen.
        how: ``'reparametrize'``: each layer computes with its effective weight. ``'project'``: the optimizer holds the
            weights themselves on the constraint set, after each step, and the layers stay stock layers but for the
            batch norms that are due. Parameter groups have to come from :func:`enc_plugin.param_groups_enc`.

    Returns:
        The report: each ENC layer with its variant and whether it has a post-norm, and what stays plain.

    Raises:
        ValueError: If an option is unknown, a pattern matches no layer, a layer cannot be normalised (a row of one
            element, a constant row), a layer is ENC already with another variant or alpha, the network does not run on
            ``example``, ``preserve`` finds a layer whose scale no batch norm can take, or the model is wrapped for
            distributed training already and would get new parameters. The model is then unchanged.
        TypeError: If an argument is of another type.

    Warns:
        NoEffectWarning: If there is no layer to convert.
        UserWarning: If ``preserve`` could not keep the outputs, the network was not seen at work, or layers have no
            norm behind them (not with ``post_norm=False``).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> report = to_enc(model)
        >>> len(report), report.num_post_norms
        (2, 1)
    """
    _check_model(model)
    check_variant(variant)
    check_alpha_option(alpha)
    if not isinstance(post_norm, bool) and not (isinstance(post_norm, str) and post_norm == "auto"):
        raise ValueError(f"post_norm: expected 'auto', True or False, got {post_norm!r}")
    check_type("preserve", preserve, (bool, Tensor), "True, False or a batch of inputs")
    _check_how(how, alpha, preserve)
    check_type("example", example, (Tensor, tuple, dict, type(None)), "a batch, a tuple or dict of arguments, or None")

    evidence = _look_at(model, example, preserve)
    problems = _unconvertible(model, evidence)
    names = [name for name, module in model.named_modules() if _is_layer(module) and name not in problems]
    selected = _select(names, include, exclude, problems)
    modules = dict(model.named_modules())

    needs_norm = evidence.wants_norm() if post_norm == "auto" else set()
    if post_norm is True:
        needs_norm = {modules[name] for name in selected}
    cannot_have_norm = {name: post_norm_problem(modules[name]) for name in selected if modules[name] in needs_norm}
    problems.update({name: reason for name, reason in cannot_have_norm.items() if reason is not None})
    selected = [name for name in selected if name not in problems]

    # Check everything before the first change: a refused model is left as it was.
    for name in selected:
        module = modules[name]
        if isinstance(module, ENCLayer) or projection_of(module) is not None:
            _check_same_options(name, module, variant, alpha, how)
        else:
            _check_names(name, module, alpha, module in needs_norm)
    weights = {name: modules[name].weight for name in selected if not isinstance(modules[name], ENCLayer)}
    check_all_normalizable(weights, variant)
    gains = [name for name in selected if _gains_parameters(modules[name], alpha, modules[name] in needs_norm)]
    if gains:
        refuse_wrapped(model)

    has_norm = needs_norm | {layer for _, layer in enc_layers(model) if layer.enc_norm is not None}
    plan = None
    # Weights that were loaded from ENC layers have their function already.
    plain = {name: modules[name] for name in selected if not getattr(modules[name], "loaded_settings", None)}
    if plain and preserve is not False:
        plan = Plan(model, plain, has_norm, evidence.trace)

    layers = []
    for name in selected:
        module = modules[name]
        if not isinstance(module, ENCLayer):
            # Changing the class keeps every reference, hook and shared module in place.
            module.__class__ = enc_class(type(module))
            module._init_enc(variant, alpha, module in needs_norm)
        elif module in needs_norm and module.enc_norm is None:
            module.add_post_norm()
        normed = module.enc_norm is not None
        adds_bias = normed and module.bias is None
        layers.append(ConvertedLayer(name, type(module).__name__, variant, alpha, normed, adds_bias))
    if how == "project":
        for name in selected:
            make_projected(modules[name])
    watch_optimizers((name, modules[name]) for name in gains)
    _guard_fusers(model)
    if layers:
        average_from_start(model)
    owns_norm = {layer for _, layer in enc_layers(model) if layer.enc_norm is not None}
    report = ConversionReport(
        layers,
        plain_weights(model, problems),
        _keep_function(plan, variant),
        [name for name in evidence.without_norm(owns_norm) if name in selected],
        {name: why for name, why in evidence.guessed().items() if name in selected},
    )
    text = describe_plain_majority(model, {x: why for x, why in report.skipped.items() if x in problems})
    if text and report.layers:
        warnings.warn(f"to_enc: {text}; report.skipped names them", UserWarning, stacklevel=2)
    _warn_of_doubts(report, evidence, post_norm)
    if not report.layers:
        warnings.warn(
            f"to_enc changed nothing: {type(model).__name__} has no Conv1d/2d/3d or Linear layer"
            + (" that include and exclude leave" if names else ""),
            NoEffectWarning,
            stacklevel=2,
        )
    return report


def _check_how(how: str, alpha: float | str, preserve: bool | Tensor) -> None:
    if not isinstance(how, str) or how not in ("reparametrize", "project"):
        raise ValueError(f"how: expected 'reparametrize' or 'project', got {how!r}")
    if how == "project" and alpha == "learnable":
        raise ValueError("alpha: a learnable alpha needs how='reparametrize'; 'project' holds a constant one")
    if how == "project" and preserve is not False:
        raise ValueError("preserve: needs how='reparametrize', because 'project' changes no weight before training")


def _check_model(model: nn.Module) -> None:
    check_type("model", model, nn.Module, "a torch.nn.Module (of a runner: runner.model)")


def enc_layers(model: nn.Module) -> Iterator[tuple[str, ENCLayer]]:
    """The ENC layers of ``model`` with their qualified names, each once, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ENCLayer))


def fold(model: nn.Module, example: Tensor | tuple | dict | None = None) -> nn.Module:
    r"""The plain network that computes what an ENC network computes in eval mode: the inverse of :func:`to_enc`.

    Weights become :math:`\hat W`; post-norms merge into weight and bias. Classes go back to the stock ones
    (``ENCImageClassifier`` to ``ImageClassifier``). The state dict loads, strictly, into the stock model.

    Args:
        model: Any ``nn.Module`` with ENC layers; it is left as it is.
        example: A batch that the network takes, as for :func:`to_enc`, to make sure that nothing else reads the
            weights of the ENC layers. None: one is made up where possible.

    Returns:
        A new model in the mode (train or eval) of ``model``. A layer that had a post-norm but no bias has got a bias:
        only such a layer keeps the state dict from fitting the stock model.

    Raises:
        ValueError: If an effective weight is not defined (a constant row, NaN), a post-norm keeps no running
            statistics, something else computes with the free weight of an ENC layer, or the network does not run on
            ``example``.

    Warns:
        NoEffectWarning: If there is no ENC layer; the result is then a copy.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> _ = to_enc(model)
        >>> plain = fold(model)
        >>> type(plain[3]).__name__, list(plain[3].state_dict())
        ('Linear', ['weight', 'bias'])
    """
    _check_model(model)
    if next(constrained_layers(model), None) is None:
        warnings.warn(f"fold changed nothing: {type(model).__name__} has no ENC layer", NoEffectWarning, stacklevel=2)
    for name, layer in enc_layers(model):
        if not layer.weight.is_meta:
            check_normalizable(name, layer.weight, layer.enc_variant, layer.enc_kept)
    try:
        refuse_weights_read_elsewhere(model, record(model, example), dict(enc_layers(model)))
    except RecordError as error:
        if example is not None:
            raise ValueError(f"example: {error}") from error
    model = copy.deepcopy(model, copies_of_results(model.modules()))
    for module in list(model.modules()):
        for name in [key for key, value in module.__dict__.items() if isinstance(value, _FoldFirst)]:
            delattr(module, name)
        if hasattr(module, "become_plain"):
            module.become_plain()
    unmark(model)
    drop_averages(model)
    return model


class _FoldFirst:
    """Stands in for a block's own ``fuse`` while the block is ENC: that would merge W, which the block does not use."""

    def __init__(self, owner: str, method: str):
        self.owner, self.method = owner, method

    def __call__(self, *args, **kwargs):
        raise ValueError(
            f"{self.owner}.{self.method} merges the weights of its layers, but they are ENC and compute with others; "
            f"call enc_plugin.fold(model) first and use {self.method} on the plain model that it returns"
        )


def _guard_fusers(model: nn.Module) -> None:
    """Let blocks that merge their layers' weights (RepVGG, MobileOne, LeViT, ...) ask for :func:`fold`."""
    for module in model.modules():
        if next(enc_layers(module), None) is None:
            continue
        owner = module.plain_class if isinstance(module, ENCLayer) else type(module)
        for method in ("fuse", "reparameterize", "switch_to_deploy"):
            if callable(getattr(owner, method, None)):
                module.__dict__[method] = _FoldFirst(type(module).__name__, method)


def _look_at(model: nn.Module, example, preserve: bool | Tensor) -> Evidence:
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
            f"preserve: the network is run once to find the batch norm behind each layer, and {evidence.failure}: "
            "preserve=<Tensor> or example=..."
        )
    return evidence


def _warn_of_doubts(report: ConversionReport, evidence: Evidence, post_norm: str | bool) -> None:
    if report.guessed and evidence.failure is not None:
        warnings.warn(
            f"to_enc did not see the network at work ({evidence.failure}: example=...). It took for granted that each "
            f"of the {len(report.guessed)} layers alone computes with its weight, and guessed which batch norms follow",
            UserWarning,
            stacklevel=3,
        )
    if report.without_norm and post_norm is not False:
        names = report.without_norm
        warnings.warn(
            f"to_enc: {len(names)} of {len(report)} ENC layers have no norm behind them, so that their outputs stay as "
            f"small as their weights: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. A network of such "
            "layers hardly trains; give each layer a batch norm of its own with post_norm=True, or leave them plain "
            "with exclude=[...]",
            UserWarning,
            stacklevel=3,
        )


def _keep_function(plan: Plan | None, variant: str) -> Preservation | None:
    if plan is None:
        return None
    preserved = plan.apply()
    if not preserved.output_change < 1e-3:  # NaN too; rounding in float32 stays below 1e-4
        why = f"{variant!r} removes means, 'wn' and 'fro' do not"
        if not is_centered(variant):
            why = "the forward pass reads a weight in a way that is not followed"
        warnings.warn(f"to_enc could not keep the function ({why}); {preserved}", UserWarning, stacklevel=3)
    return preserved


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, ENCLayer) or enc_class(type(module)) is not None


def _unconvertible(model: nn.Module, evidence: Evidence) -> dict[str, str]:
    """Layers that must stay plain, by name, with the reason."""
    problems = evidence.read_elsewhere()
    for name, module in model.named_modules():
        if _is_layer(module) and not isinstance(module, ENCLayer):
            reason = weight_problem(module)
            if "forward" in module.__dict__:  # a change of class would not reach it
                reason = "its forward was replaced on the instance"
            if reason is not None:
                problems.setdefault(name, reason)
        elif name in problems:
            raise ValueError(
                f"layer {name!r} is ENC already, but {problems[name]}: that computes with the free weight; build it as "
                "a plain layer"
            )
    return problems


def _select(
    names: list[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None, plain: Iterable[str]
) -> list[str]:
    """Those of ``names`` that the patterns leave; ``exclude`` may also name layers that stay plain anyway."""

    def matching(argument: str, patterns: str | Sequence[str], names: list[str]) -> set[str]:
        found: set[str] = set()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{argument}: expected a pattern, a sequence of patterns or None, got {patterns!r}")
        for pattern in patterns:
            hits = {n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)}
            if not hits:
                shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
                raise ValueError(f"{argument}: {pattern!r} matches no layer; the layers are {shown or '(none)'}")
            found |= hits
        return found

    kept = set(names) if include is None else matching("include", include, names)
    if exclude is not None:
        kept -= matching("exclude", exclude, [*names, *plain])
    return [name for name in names if name in kept]


def _gains_parameters(layer: nn.Module, alpha: float | str, needs_norm: bool) -> bool:
    if isinstance(layer, ENCLayer):
        return needs_norm and layer.enc_norm is None
    return needs_norm or alpha == "learnable"


def _check_names(name: str, layer: nn.Module, alpha: float | str, needs_norm: bool) -> None:
    """Refuse a subclass with attributes of its own where those of the ENC layer have to go."""
    taken = ["log_alpha"] if alpha == "learnable" and not lacks_attribute(layer, "log_alpha") else []
    if needs_norm and not any(lacks_attribute(layer, key) for key in POST_NORM_KEYS):
        taken += POST_NORM_KEYS
    if taken:
        raise ValueError(
            f"layer {name!r}: {type(layer).__name__} has attributes {', '.join(taken)} of its own, in whose place a "
            f"parameter of the ENC layer has to go; use a constant alpha and post_norm=False, or exclude=[{name!r}]"
        )


def _check_same_options(name: str, layer: nn.Module, variant: str, alpha: float | str, how: str) -> None:
    held = projection_of(layer)
    if held is None:
        own = (layer.enc_settings["variant"], layer.enc_settings["alpha"], "reparametrize")
    else:
        own = (held.enc_variant, held.enc_alpha, "project")
    if own != (variant, alpha, how):
        (own_variant, own_alpha, own_how), other = own, f", how={how!r}" if own[2] != how else ""
        raise ValueError(
            f"layer {name!r} is ENC already with variant={own_variant!r}, alpha={own_alpha!r}"
            f"{f', how={own_how!r}' if other else ''}, but variant={variant!r}, alpha={alpha!r}{other} is asked for; "
            f"make the two agree, or use exclude=[{name!r}]"
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
def audit(model: nn.Module, folded: bool = False, inputs: Tensor | None = None) -> Audit | FoldedAudit:
    r"""Check the constraint: :math:`\lVert\hat W\rVert_F^2`, :math:`\lVert W\rVert_F` and deviation, per ENC layer.

    Norms are summed in float64. The model is only read.

    Args:
        model: Any ``nn.Module``; layers that are not ENC have no row.
        folded: List instead the norms of the weights that the bound is about, :math:`\mathrm{diag}(\gamma/\sigma) W`:
            every layer, ENC or plain, with the batch norms behind it folded in, and the AM-GM slack.
        inputs: For ``folded``: a batch that the model takes; adds the norms of the convolutions as linear maps.

    Returns:
        The table, in module order.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = to_enc(model)
        >>> audit(model).max_deviation < 1e-6
        True
    """
    _check_model(model)
    check_type("folded", folded, bool, "True or False")
    check_type("inputs", inputs, (Tensor, type(None)), "a batch of inputs or None")
    if folded:
        return audit_folded(model, inputs)
    rows = Audit()
    for name, layer in constrained_layers(model):
        rows.append(
            AuditRow(
                name,
                layer.type_name if isinstance(layer, Projected) else type(layer).__name__,
                layer.enc_variant,
                float(layer.enc_alpha),
                layer.effective_weight.double().square().sum().item(),
                layer.weight.double().square().sum().sqrt().item(),
            )
        )
    return rows
