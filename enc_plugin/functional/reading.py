"""What reading a network's derivative needs: eval mode, no chance, and nothing changed afterwards."""

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

from .eval_mode import module_of
from .precision import full_float32
from .rng import kept_random_states


@contextmanager
def reading(device: torch.device) -> Iterator[None]:
    """Block with gradients on, compilation and TF32 off; restores random states, refuses batch norm in train mode."""
    handle = register_module_forward_pre_hook(_refuse_module)
    try:
        rng = kept_random_states([device])
        with torch.inference_mode(False), torch.enable_grad(), rng, _uncompiled(), full_float32():
            yield
    finally:
        handle.remove()


@contextmanager
def refuse_random(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Iterator[None]:
    """Block in which ``forward`` runs on ``inputs``; raise ``ValueError`` after it if its output is random.

    Random is a network that draws random numbers while a module that draws them is in train mode, whatever its class,
    or whose output is another one with other numbers.
    """
    before = _random_states(inputs.device)
    yield
    if _random_states(inputs.device) == before:
        return
    drawing: list[nn.Module] = []  # the innermost module that draws comes first
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
    source = drawing[0] if drawing else module_of(forward)  # the hooks see no module whose method is called directly
    name = "network" if source is None else type(source).__name__
    if source is not None and source.training:
        raise ValueError(
            f"forward: a {name} is in train mode and draws random numbers, so that the output is random; call "
            "model.eval() first"
        )
    first, second = (out.nan_to_num() if isinstance(out, Tensor) else torch.zeros(0) for out in outputs)
    if not torch.equal(first, second):
        raise ValueError(
            f"forward: expected the same output for the same input, but it is random: the {name} draws random numbers "
            "in eval mode too (look for functional dropout without training=self.training, and for noise)"
        )


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
    """States of the generators that a forward pass may draw from: Python's, torch's and the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return random.getstate(), *(bytes(state.cpu().tolist()) for state in states)  # tensors compare by element


def _uncompiled() -> AbstractContextManager[Any]:
    """Block in which compiled functions run as they were written."""
    # A compiled backward pass frees its buffers, whatever retain_graph says. Nothing is compiled without this module,
    # and importing it takes a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
