"""Finds where values first became NaN or infinite in a run that has diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..measuring.untouched import unwrap
from ..surgery.projected import check_constrained
from .unread_step import largest_magnitude


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the tensors that training changes: parameters with gradients and running statistics."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for prefix, module in model.named_modules():
        for key in ("running_mean", "running_var"):
            if isinstance(module._buffers.get(key), Tensor):
                yield f"{prefix}.{key}".removeprefix("."), module._buffers[key]


def constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the other floating point tensors of checkpoints; they may be infinite (masks, observers)."""
    others = {name for name, _ in trained(model)}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in others:
            yield name, value


def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all elements are finite; waits for the device."""
    return math.isfinite(largest_magnitude(tensors).item())


def find_cause(runner: Runner, batch: Any) -> str:
    """Sentence that says where values first became NaN or infinite: batch, weights, forward or backward pass."""
    model = unwrap(runner.model)
    inputs = batch.get("inputs") if isinstance(batch, Mapping) else None
    if not all(x.isfinite().all() for x in tree_leaves(inputs) if isinstance(x, Tensor)):
        return f"the batch holds NaN or Inf{_bad_samples(batch)}"
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        return f"{len(broken)} weights hold NaN or Inf: {', '.join(map(repr, broken[:3]))}"
    try:
        check_constrained(model)
    except ValueError as error:
        return str(error)
    layer = _first_overflow(runner, model, batch)
    if layer is not None:
        return f"the weights are finite, and the first output that is not finite is that of {layer}"
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        return f"only gradients are not finite, and the one nearest to the loss is that of {broken[-1]!r}"
    return (
        "rerunning the last batch gave finite values, so the cause is random (augmentation, dropout) or lies in an "
        "earlier batch"
    )


@torch.no_grad()
def _first_overflow(runner: Runner, model: nn.Module, batch: Any) -> str | None:
    """Run the batch again; name and class of the first module whose output is not finite, or None."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, out: Any) -> None:
        # Masks legitimately contain minus infinity.
        if not found and not all((t < math.inf).all() for t in tree_leaves(out) if isinstance(t, Tensor)):
            found.append(f"{name!r} ({type(module).__name__})")

    handles = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        data = model.data_preprocessor(batch, True)
        with runner.optim_wrapper.optim_context(model):
            model(**data, mode="loss")
    except Exception:  # the unwrapped model may fail when run alone; use what was found until then
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad_samples(batch: Mapping) -> str:
    """Files of the images that are not finite, or their numbers in the batch; empty if there are no images."""
    inputs, samples = batch["inputs"], batch.get("data_samples") or ()
    if not isinstance(inputs, (Tensor, list)):
        return ""
    is_image = isinstance(inputs[0], Tensor) and inputs[0].dim() < 4  # otherwise inputs are views of all samples
    views = [inputs] if is_image else inputs
    bad = sorted({i for view in views for i, image in enumerate(view) if not image.isfinite().all()})
    names = [str(i < len(samples) and samples[i].get("img_path") or f"number {i} of the batch") for i in bad[:3]]
    return f" ({', '.join(names)})"
