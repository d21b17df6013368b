"""Whether norms undo the scale of a layer's output, or the scale reaches the network's output."""

from __future__ import annotations

import heapq
from collections.abc import Set
from dataclasses import dataclass, field

from torch import nn
from torch.utils._pytree import tree_leaves

from .operations import HOMOGENEOUS, NORMS, TINY, WEIGHTED
from .trace import Op, Trace, Value


@dataclass
class Fate:
    """What happens to the scale of a layer's output.

    Attributes:
        outputs: The network's outputs that depend on the scale.
        lost_in: The first operation through which the scale cannot be followed (neither kept nor undone), or None.
    """

    outputs: list[Value] = field(default_factory=list)
    lost_in: Op | None = None

    @property
    def undone(self) -> bool:
        """Whether norms undo the scale on all paths."""
        return not self.outputs and self.lost_in is None


def fate(trace: Trace, layer: nn.Module, through_layers: bool = True, norms_due: Set[nn.Module] = frozenset()) -> Fate:
    """Follow a positive factor of the outputs of ``layer`` through the recorded operations.

    Each value has a degree of homogeneity in the factor: 1 at the layer's output, 0 once a norm has undone the factor,
    whether the norm is one operation or several (``x / x.norm()``).

    Args:
        trace: A recorded pass in which ``layer`` was called.
        layer: A convolution or linear layer.
        through_layers: Whether to follow the factor through other layers without a bias.
        norms_due: Layers that will have a post-norm, which undoes the factor.
    """
    found = Fate()
    outputs = set(trace.outputs)
    degrees: dict[Value, float] = {}
    queue: list[tuple[int, Op]] = []
    queued: set[int] = set()

    def reach(value: Value, degree: float) -> None:
        degrees[value] = degree
        if value in outputs:
            found.outputs.append(value)
        for op in value.readers:
            if op.index not in queued:
                queued.add(op.index)
                heapq.heappush(queue, (op.index, op))

    for call in trace.calls.get(layer, ()):
        if call.output is not None:
            reach(call.output, 1.0)
    while queue:
        op = heapq.heappop(queue)[1]
        if through_layers and any(module in norms_due for module in op.inside):
            continue
        made = _degrees(op, degrees, through_layers)
        if made is None:
            found.lost_in = op
            return found
        for value, degree in zip(op.outputs, made, strict=False):
            if abs(degree) > 1e-9:
                reach(value, degree)
    return found


def _degrees(op: Op, degrees: dict[Value, float], through_layers: bool) -> list[float] | None:
    """Degree of homogeneity of each output, or None if ``op`` is not homogeneous."""
    name = op.kind
    known = [degrees[value] for value in op.inputs if value in degrees]
    same = known[0] if len(set(known)) == 1 else None

    def of(i: int) -> float:
        return degrees.get(op.args[i], 0.0) if i < len(op.args) and isinstance(op.args[i], Value) else 0.0

    degree: float | None = None
    if not op.reads_values:
        degree = 0.0
    elif any(norm in name for norm in NORMS):
        degree = 0.0 if op.args[0] in degrees else None
    elif name in ("mul", "div"):
        degree = of(0) + of(1) if name == "mul" else of(0) - of(1)
    elif name in ("add", "sub"):
        degree = _degree_of_sum(op, degrees, same)
    elif name in WEIGHTED:
        degree = _degree_of_product(op, WEIGHTED[name], degrees, through_layers)
    elif name in ("rsqrt", "sqrt", "reciprocal", "pow"):
        exponents = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "pow": op.args[1] if len(op.args) > 1 else None}
        exponent = exponents[name]
        degree = of(0) * exponent if isinstance(exponent, (int, float)) else None
    elif same is not None and name == "var":
        degree = 2 * same
    elif same is not None and name == "var_mean":
        return [2 * same, same]
    elif name in ("clamp_min", "clamp"):
        low, high = [*op.args[1:3], None, None][:2]
        degree = same if high is None and isinstance(low, (int, float)) and 0 <= low <= TINY else None
    elif name in HOMOGENEOUS:
        degree = same
    return None if degree is None else [degree] * len(op.outputs)


def _degree_of_sum(op: Op, degrees: dict[Value, float], same: float | None) -> float | None:
    for term in op.args[:2]:
        if isinstance(term, Value):
            # A term without the factor is allowed only if it depends on the input, as in a residual sum: a later norm
            # then normalises both. A constant would not scale.
            if term not in degrees and not (term.from_input and same == 1):
                return None
        elif abs(term) > TINY:
            return None
    return same


def _degree_of_product(op: Op, bias: int | None, degrees: dict[Value, float], through_layers: bool) -> float | None:
    if bias is not None and op.args[bias] is not None:
        return None
    if not through_layers and not all(value.from_input for value in op.inputs):
        return None
    return sum(degrees.get(value, 0.0) for value in tree_leaves(op.args) if isinstance(value, Value))
