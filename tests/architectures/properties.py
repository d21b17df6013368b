"""What ENC promises of any network, each promise measured on one architecture.

Each function takes a :class:`Subject` and returns the cell of the table; it raises ``AssertionError`` where a promise
is broken, and :class:`StockCannot` where the stock network itself lacks the ability.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from architectures.catalogue import CLASSES, Architecture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from enc_plugin import add_shift, audit, fold, param_groups_enc, to_enc
from enc_plugin.convert import enc_layers
from enc_plugin.layers import ENCLayer

BATCH = 4
WEIGHT_DECAY = 1e-4
EXACT = 1e-7  # in float64; the gates of squeeze-and-excitation may magnify rounding to 1e-9


class StockCannot(Exception):
    """The stock network lacks this ability, so ENC cannot be asked for it."""


class Subject:
    """One architecture: the stock network, and the ENC network made of an equal one and trained for a step."""

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.x = pictures(BATCH, architecture.shape)
        self.labels = torch.arange(BATCH) % CLASSES

    @cached_property
    def stock(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.architecture.build().eval()
        for name in self.architecture.redraw:
            nn.init.normal_(model.get_submodule(name).weight, std=0.02)
        return model

    @cached_property
    def _converted(self):
        model = copy.deepcopy(self.stock)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = to_enc(model, **self.architecture.enc)
        return model, report, [str(warning.message) for warning in caught]

    @property
    def report(self):
        """What ``to_enc`` reported."""
        return self._converted[1]

    @property
    def warnings(self) -> list[str]:
        """What ``to_enc`` warned of."""
        return self._converted[2]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(param_groups_enc(self._converted[0], WEIGHT_DECAY), lr=0.1, momentum=0.9)
        add_shift(optimizer)
        return optimizer

    @cached_property
    def _trained(self):
        """The ENC network after a step, the loss, and its ENC weights before the step."""
        model = self._converted[0].train()
        before = {name: layer.weight.detach().clone() for name, layer in enc_layers(model)}
        torch.manual_seed(0)
        loss = loss_of(model, self.x, self.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # at its start, a deep network's may be 1e5
        self.optimizer.step()
        return model.eval(), loss.detach(), before

    @property
    def enc(self) -> nn.Module:
        """The trained ENC network, in eval mode."""
        return self._trained[0]

    @cached_property
    def folded(self) -> nn.Module:
        return fold(self.enc)

    @cached_property
    def exact(self) -> nn.Module:
        """The trained ENC network in float64, where a difference is a fault and not rounding."""
        return copy.deepcopy(self.enc).double()

    @cached_property
    def exact_folded(self) -> nn.Module:
        return fold(self.exact)

    @cached_property
    def exact_logits(self) -> Tensor:
        return outputs(self.exact, self.x.double())

    @cached_property
    def logits(self) -> Tensor:
        return outputs(self.enc, self.x)


def pictures(count: int, shape: tuple[int, ...]) -> Tensor:
    """Blurred noise in differing colours and contrasts: white noise has the same pooled features in every picture."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, shape[0], *[4] * (len(shape) - 1), generator=generator)
    fine = torch.randn(count, *shape, generator=generator)
    contrast = torch.linspace(0.5, 1.5, count).view(-1, *[1] * len(shape))
    return contrast * (F.interpolate(coarse, shape[1:]) + 0.3 * fine)


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The loss as the libraries train: mmpretrain's own, else cross-entropy summed over all logits (distillation and
    auxiliary classifiers have their own)."""
    if hasattr(model, "extract_feat"):
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(int(label)) for label in labels]
        return sum(value for name, value in model(x, samples, mode="loss").items() if "loss" in name)
    logits = [out for out in tree_leaves(model(x)) if isinstance(out, Tensor)]
    return sum(F.cross_entropy(out, labels) for out in logits)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs in the present mode, ``(N, K)``, in float64."""
    return torch.cat([out.double().flatten(1) for out in tree_leaves(model(x)) if isinstance(out, Tensor)], 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# -- the columns -------------------------------------------------------------------------------------------------------


def parameters(subject: Subject) -> str:
    return f"{sum(p.numel() for p in subject.stock.parameters()) / 1e6:.1f} M"


def layers(subject: Subject) -> str:
    assert len(subject.report) > 0
    return str(len(subject.report))


def post_norms(subject: Subject) -> str:
    return str(subject.report.num_post_norms)


def skipped(subject: Subject) -> str:
    return str(len(subject.report.skipped)) if subject.report.skipped else "-"


def step(subject: Subject) -> str:
    """A training step: finite loss, a finite gradient for every trainable ENC weight, and each of them moves."""
    model, loss, before = subject._trained
    assert loss.isfinite()
    trained = {name: layer.weight for name, layer in enc_layers(model) if layer.weight.requires_grad}
    grads = {name: weight.grad for name, weight in trained.items()}
    without = [name for name, grad in grads.items() if grad is None]
    assert not without, f"no gradient: {_some(without)}"
    broken = [name for name, grad in grads.items() if not grad.isfinite().all()]
    assert not broken, f"gradient not finite: {_some(broken)}"
    still = [name for name, weight in trained.items() if torch.equal(weight, before[name])]
    assert not still, f"not moved: {_some(still)}"
    deviation = audit(model).max_deviation
    assert deviation < 1e-5, f"the squared norm deviates by {deviation:.1e}"
    dead = [name for name, grad in grads.items() if not grad.any()]
    return f"{loss:.2f}" + (f" ({len(dead)} zero gradients)" if dead else "")


def spread(subject: Subject) -> str:
    """How much the logits tell inputs apart, relative to their size; a network without norms goes flat."""
    assert subject.logits.isfinite().all()
    return f"{(subject.logits - subject.logits.mean(0)).norm() / subject.logits.norm():.0e}"


def fold_error(subject: Subject) -> str:
    """The folded network has the same outputs: to 1e-5 in float32, or to rounding where float64 says that it is."""
    error = relative_error(outputs(subject.folded, subject.x), subject.logits)
    assert not any(isinstance(module, ENCLayer) for module in subject.folded.modules())
    exact_error = relative_error(outputs(subject.exact_folded, subject.x.double()), subject.exact_logits)
    assert exact_error < EXACT, f"{error:.1e}, {exact_error:.1e} in float64"
    if not error < 1e-5:
        rounding = relative_error(subject.logits, subject.exact_logits)
        assert error < 4 * rounding, f"{error:.1e}; ENC itself rounds by {rounding:.1e}"
        return f"{error:.0e} (ENC rounds by {rounding:.0e})"
    return f"{error:.0e}"


def keys(subject: Subject) -> str:
    """The folded checkpoint loads into the stock network, and a stock checkpoint into the ENC network, both strictly.

    A layer without a bias that got a post-norm has a bias after folding; its stock counterpart is given one.
    """
    stock = copy.deepcopy(subject.stock)
    without_bias = [x.name for x in subject.report.layers if x.post_norm and stock.get_submodule(x.name).bias is None]
    for layer in map(stock.get_submodule, without_bias):
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    stock.double().load_state_dict(subject.exact_folded.state_dict(), strict=True)
    stock.train().eval()  # LeViT gathers its biases as it enters eval mode
    error = relative_error(outputs(stock, subject.x.double()), subject.exact_logits)
    assert error < EXACT, f"the stock network with folded weights differs by {error:.1e}"
    enc = copy.deepcopy(subject.enc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint is plain
        enc.load_state_dict(subject.stock.state_dict(), strict=True)
    loaded = enc.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in subject.stock.state_dict().items())
    return f"ok, + {len(without_bias)} biases" if without_bias else "ok"


def groups(subject: Subject) -> str:
    """Every parameter in one group, biases without decay, ENC weights with the shift."""
    model = subject.enc
    settings = {}
    for group in subject.optimizer.param_groups:
        for param in group["params"]:
            assert param not in settings, "a parameter is in two groups"
            settings[param] = group
    enc_weights = {layer.weight for _, layer in enc_layers(model)}
    for name, param in model.named_parameters():
        assert param in settings or not param.requires_grad, f"{name} is in no group"
        group = settings[param]
        if name.endswith("bias"):
            assert group["weight_decay"] == 0, f"{name} decays"
        if param in enc_weights:
            assert group["weight_decay"] == WEIGHT_DECAY, f"{name} does not decay"
            assert group.get("shift_eps"), f"{name} has no shift"
        else:
            assert "shift_eps" not in group, f"{name} has a shift"
    return str(len(subject.optimizer.param_groups))


def copies(subject: Subject) -> str:
    """Copies and pickles have equal outputs."""
    _stock_can(lambda: pickle.dumps(subject.stock))
    for copied in (copy.deepcopy(subject.enc), pickle.loads(pickle.dumps(subject.enc))):
        assert torch.equal(outputs(copied, subject.x), subject.logits)
    return "ok"


def export(subject: Subject) -> str:
    """``torch.export`` of the ENC and of the folded network."""
    x = subject.x.double()
    for model in (subject.exact, subject.exact_folded):
        try:
            program = torch.export.export(model, (x,))
        except Exception:
            _stock_can(lambda: torch.export.export(subject.stock, (subject.x,)))
            raise
        error = relative_error(outputs(program.module(), x), subject.exact_logits)
        assert error < EXACT, f"the exported network differs by {error:.1e}"
    return "ok"


def fx(subject: Subject) -> str:
    """Symbolic tracing, and with it torchvision's feature extraction."""
    _stock_can(lambda: torch.fx.symbolic_trace(subject.stock))
    x = subject.x.double()
    error = relative_error(outputs(torch.fx.symbolic_trace(subject.exact), x), subject.exact_logits)
    assert error < EXACT, f"the traced network differs by {error:.1e}"
    for model in (subject.exact, subject.exact_folded):
        last = get_graph_node_names(model)[1][-1]
        error = relative_error(outputs(create_feature_extractor(model, [last]), x), subject.exact_logits)
        assert error < EXACT, f"the extracted {last!r} differs by {error:.1e}"
    return "ok"


def folded_norms(subject: Subject) -> str:
    """``audit(folded=True)`` against the impulse response of some layers and the norms behind them."""
    x = subject.x[:1]
    table = audit(subject.enc, folded=True, inputs=x)
    modules = dict(subject.enc.named_modules())
    ran = {name for name, layer in enc_layers(subject.enc)} & {row.name for row in table}
    missing = [name for name, _ in enc_layers(subject.enc) if name not in ran and name not in table.skipped]
    assert not missing, f"ENC layers without a row: {_some(missing)}"
    shapes: dict[str, torch.Size] = {}
    hooks = [
        modules[row.name].register_forward_pre_hook(lambda _, args, key=row.name: shapes.update({key: args[0].shape}))
        for row in table
    ]
    outputs(subject.enc, x)
    for hook in hooks:
        hook.remove()
    cheap = sorted(
        (_response_cost(modules[row.name], shapes[row.name]), index)
        for index, row in enumerate(table)
        if row.map_sq_norm is not None
    )
    sample = cheap[:: max(1, len(cheap) // 8)]
    chosen = [table[index] for n, (cost, index) in enumerate(sample) if cost < 3e9 or n == 0]
    assert chosen
    for row in chosen:
        norms = [modules[norm] for norm in row.norms if norm != f"{row.name}.norm"]
        expected = impulse_response_sq_norm(modules[row.name], norms, shapes[row.name])
        deviation = abs(row.map_sq_norm / expected - 1)
        assert deviation < 1e-3, f"{row.name}: {row.map_sq_norm:.6g}, its impulse response has {expected:.6g}"
    return f"{len(chosen)} of {len(table)}"


def _response_cost(layer: nn.Module, shape: torch.Size) -> int:
    """About the multiplications of an impulse response."""
    positions = shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]
    return shape[1:].numel() * layer.weight.numel() * positions.numel()


@torch.no_grad()
def impulse_response_sq_norm(layer: nn.Module, norms: list[_BatchNorm], shape: torch.Size) -> float:
    """Squared Frobenius norm of the linear part of ``layer`` and the ``norms`` behind it, on a sample of ``shape``."""
    layer, *norms = (copy.deepcopy(module).double().eval() for module in (layer, *norms))
    size = shape[1:].numel()

    def run(batch: Tensor) -> Tensor:
        batch = layer(batch.view(-1, *shape[1:]))
        for norm in norms:  # without the activation that timm's norms run too
            batch = _BatchNorm.forward(norm, batch)
        return batch

    origin = run(torch.zeros(1, size, dtype=torch.float64))
    total = 0.0
    for impulses in torch.eye(size, dtype=torch.float64).split(256):
        total += (run(impulses) - origin).square().sum().item()
    return total


def _stock_can(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except Exception as error:
        raise StockCannot(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "")


COLUMNS: dict[str, Callable[[Subject], str]] = {
    "parameters": parameters,
    "ENC layers": layers,
    "post-norms": post_norms,
    "skipped": skipped,
    "step": step,
    "spread": spread,
    "fold error": fold_error,
    "keys": keys,
    "groups": groups,
    "copies": copies,
    "export": export,
    "fx": fx,
    "folded norms": folded_norms,
}
