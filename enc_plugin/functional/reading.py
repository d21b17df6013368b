"""The context in which a network's input gradient is measured: deterministic, in eval mode, without side effects."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .buffers import kept_buffers
from .eval_mode import module_of
from .precision import full_float32
from .rng import kept_random_states


@contextmanager
def reading(inputs: Tensor, model: nn.Module | None = None) -> Iterator[None]:
    """Enable gradients, disable compilation, TensorFloat-32 and autocast, restore random states and buffers on exit.

    Within the block, a batch norm that uses batch statistics, or a dropout in train mode, raises ``ValueError``.

    Args:
        inputs: Inputs of the network. The random state of their device is restored, besides the CPU's. If they are in
            half precision, the precision stays as it is: without autocast, a network in float32 could not read them.
        model: Network whose buffers are restored. (In train mode, a forward pass changes those of spectral norm.)
    """
    handle = register_module_forward_pre_hook(_refuse_module)
    try:
        rng = kept_random_states([inputs.device], model)
        buffers = nullcontext() if model is None else kept_buffers(model)
        precision = full_float32() if inputs.element_size() >= 4 else nullcontext()
        with buffers, torch.inference_mode(False), torch.enable_grad(), rng, _uncompiled(), precision:
            yield
    finally:
        handle.remove()


@contextmanager
def refuse_random(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Iterator[None]:
    """Raise ``ValueError`` after the block, which runs ``forward`` on ``inputs``, if the output is random.

    The output counts as random in two cases: a module in train mode draws random numbers, or two forward passes with
    different random numbers give different outputs.
    """
    before = _random_states(inputs.device)
    yield
    if _random_states(inputs.device) == before:
        return
    drawing: list[nn.Module] = []  # modules that draw random numbers, innermost first
    states: dict[int, tuple] = {}
    handles = [
        register_module_forward_pre_hook(lambda module, _: states.update({id(module): _random_states(inputs.device)})),
        register_module_forward_hook(
            lambda module, *_: drawing.append(module) if states[id(module)] != _random_states(inputs.device) else None
        ),
    ]
    try:
        with torch.no_grad():
            outputs = [forward(inputs.clone()) for _ in range(2)]
    finally:
        for handle in handles:
            handle.remove()
    source = drawing[0] if drawing else module_of(forward)  # hooks do not fire if a method is called directly
    name = "network" if source is None else type(source).__name__
    if source is not None and source.training:
        raise ValueError(
            f"forward: a {name} is in train mode and draws random numbers, so that the output is random; call "
            "model.eval() first"
        )
    first, second = (out.nan_to_num() if isinstance(out, Tensor) else torch.zeros(0, device="cpu") for out in outputs)
    if not torch.equal(first, second):
        raise ValueError(
            f"forward: expected the same output for the same input, but it is random: the {name} draws random numbers "
            "in eval mode too (look for functional dropout without training=self.training, and for noise)"
        )


def gradient_of(out: Tensor, x: Tensor, direction: Tensor | None = None, keep: bool = False) -> Tensor:
    """Gradient of ``(direction * out).sum()`` with respect to ``x``; ``keep`` retains the graph.

    Raises:
        ValueError: If ``out`` is not a differentiable function of ``x``.
    """
    gradient = None
    if out.requires_grad:
        (gradient,) = torch.autograd.grad(out, x, direction, retain_graph=keep, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "forward: its output does not depend on the input in a way that autograd sees; look for no_grad, "
            "inference_mode, detach, NumPy or rounding within"
        )
    return gradient


def _refuse_module(module: nn.Module, _: tuple) -> None:
    name = type(module).__name__
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        why = "is in train mode" if module.training else "keeps no running statistics"
        raise ValueError(
            f"forward: a {name} {why}, so that samples depend on their batch; "
            + ("call model.eval() first" if module.training else "use track_running_stats=True")
        )
    if isinstance(module, _DropoutNd) and module.training and module.p > 0:
        raise ValueError(f"forward: a {name} is in train mode, so that the output is random; call model.eval() first")


def _random_states(device: torch.device) -> tuple:
    """States of the generators that a forward pass may use: Python's, torch's and the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return random.getstate(), *(bytes(state.cpu().tolist()) for state in states)  # tensors compare by element


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions uncompiled within the block."""
    # A compiled backward pass frees its buffers even with retain_graph=True. If torch._dynamo is not imported yet,
    # nothing is compiled, and importing it would take a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def output_of(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Output of ``forward`` for a copy of ``x``, of a batch of one for two copies if ``forward`` takes them.

    Some networks start with an in-place operation, which a leaf does not allow. Of a batch of one whose tokens were
    turned into maps (TinyViT, MViT, VAN), torch 2.14 computes wrong gradients of batch norms in eval mode on the CPU.
    And a network that calls ``squeeze()`` loses the dimension of such a batch.
    """
    if len(x) != 1:
        return forward(x.clone())
    try:
        out = forward(torch.cat([x, x]))
    except Exception:  # of a program that was exported for a batch of one, or an error that comes again
        return forward(x.clone())
    return out[:1] if isinstance(out, Tensor) and out.ndim and len(out) == 2 else out
