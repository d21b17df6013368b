"""What is not finite in a run that has diverged, and where it began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..functional.normalizable import check_normalizable
from ..measuring.untouched import unwrap
from ..surgery.projected import constrained_layers
from .unread_step import largest_magnitude


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that training changes: parameters with gradients, and running statistics."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for prefix, module in model.named_modules():
        for key in ("running_mean", "running_var"):
            if isinstance(module._buffers.get(key), Tensor):
                yield f"{prefix}.{key}".removeprefix("."), module._buffers[key]


def constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The other tensors of checkpoints; infinite ones are meant so (masks, bounds of observers at the start)."""
    others = {name for name, _ in trained(model)}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in others:
            yield name, value


def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all elements are; waits for the device."""
    largest = largest_magnitude(tensors)
    return largest is None or math.isfinite(largest.item())


def find_cause(runner: Runner, batch: Any) -> str:
    """Where values stopped being finite: in ``batch``, the weights, the forward pass, or the backward pass."""
    model = unwrap(runner.model)
    inputs = batch.get("inputs") if isinstance(batch, Mapping) else None
    if not all(x.isfinite().all() for x in tree_leaves(inputs) if isinstance(x, Tensor)):
        return f"the batch holds NaN or Inf itself{_pictures(batch)}"
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        return f"{len(broken)} weights hold NaN or Inf: {', '.join(map(repr, broken[:3]))}"
    for name, layer in constrained_layers(model):
        try:
            check_normalizable(name, layer.weight, layer.enc_variant, layer.enc_kept)
        except ValueError as error:
            return str(error)
    layer = _first_overflow(runner, model, batch)
    if layer is not None:
        return f"the weights are finite, and the first output that is not is that of {layer}"
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        return f"weights and outputs are finite; of the gradients, that of {broken[-1]!r} is the nearest to the loss"
    return (
        "rerunning the last batch gave finite values, so the cause is random (augmentation, dropout) or lies in an "
        "earlier batch"
    )


@torch.no_grad()
def _first_overflow(runner: Runner, model: nn.Module, batch: Any) -> str | None:
    """The module whose output is the first that is not finite, when the batch goes through once more."""
    found: list[str] = []

    def look(name: str, module: nn.Module, out: Any) -> None:
        # Minus infinity is what masks put out.
        if not found and not all((t < math.inf).all() for t in tree_leaves(out) if isinstance(t, Tensor)):
            found.append(f"{name!r} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: look(name, module, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        data = model.data_preprocessor(batch, True)
        with runner.optim_wrapper.optim_context(model):
            model(**data, mode="loss")
    except Exception:  # some wrappers' parts do not run alone; what was found counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _pictures(batch: Mapping) -> str:
    names = [
        str(sample.get("img_path") or f"number {i} of the batch")
        for i, (x, sample) in enumerate(zip(batch["inputs"], batch["data_samples"], strict=False))
        if not x.isfinite().all()
    ]
    return f" ({', '.join(names[:3])})" if names else ""
