"""The Generalization Bound Regularizer (GBR, eq. 2 and 18): squared norm of a network's input-output Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from .checks import check_class_numbers, check_floating_tensor, check_integer, check_type, holds_integers
from .directions import seeded_directions
from .eval_mode import module_of, undistributed
from .precision import at_least_float32
from .reading import gradient_of, output_of, reading, refuse_random

OUTPUTS = {
    "logits": "the output of forward",
    "probs": "the softmax of the logits",
    "label_prob": "the softmax of the true class, A_s(x) in the paper",
}


def gbr(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    output: str = "logits",
    labels: Tensor | None = None,
    projections: int | None = None,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    batch_size: int = 32,
) -> Tensor:
    r"""Squared Frobenius norm of the input-output Jacobian of each sample; its mean is the GBR (eq. 18).

    .. math:: \lVert \partial f(x) / \partial x \rVert_F^2
        = \mathbb E \, \frac CP \sum_{p=1}^{P} \lVert v_p^\top \, \partial f(x) / \partial x \rVert^2

    for C outputs and P random orthonormal directions v. The exact value takes one forward and C backward passes, an
    estimate P backward passes, with respect to the inputs only. The call has no side effects: gradients of parameters,
    ``requires_grad``, modes, buffers and random states do not change. It also works within ``torch.no_grad()`` and
    ``torch.inference_mode()``. Float32 is computed without TensorFloat-32, and without an autocast around the call.

    Args:
        forward: Maps inputs ``(N, ...)`` to outputs ``(N, C)`` (for ``'logits'``, other shapes are flattened): a model
            in eval mode or any callable. It must be deterministic, and samples must not depend on each other. A
            compiled model runs uncompiled, because a compiled backward pass can run only once. Of a
            ``DistributedDataParallel``, the network within runs, in this process alone.
        inputs: Samples x, ``(N, ...)``, floating point. The result is per squared unit of ``inputs``.
        output: The function to differentiate: ``'logits'`` (the output of ``forward``), ``'probs'`` (its softmax) or
            ``'label_prob'`` (the softmax of the true class).
        labels: True classes, ``(N,)`` integers; required for ``'label_prob'``.
        projections: Number P of random orthonormal directions for each sample: an unbiased estimate, and exact if
            P >= C. None: exact.
        generator: Generator of the directions. None: the directions are derived from torch's global random state, which
            does not change, so successive calls use the same directions.
        seeds: One seed for each sample, ``(N,)`` integers in 0..2^32-1, instead of ``generator``. The directions of a
            sample then do not depend on how samples are split into calls or processes.
        batch_size: Samples per forward pass. It limits the memory and does not change the result.

    Returns:
        ``(N,)``, float32 or float64. Neither halved nor averaged.

    Raises:
        ValueError: If ``output`` is unknown, lacks its labels or is a softmax of other than ``(N, C)`` or of
            probabilities, a batch norm uses batch statistics, the output is random (dropout or stochastic depth in
            train mode), or one sample's output depends on another sample.
        TypeError: If ``inputs`` are integers or ``forward`` does not return a tensor.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> gbr(lambda x: x @ weight.T + 1, torch.zeros(2, 2))
        tensor([14., 14.])
    """
    check_type("forward", forward, Callable, "a model or another callable")
    check_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator or None")
    check_output(output)
    check_projections(projections)
    check_integer("batch_size", batch_size, 1)
    _check_samples(inputs, output, labels, seeds)
    values = []
    with undistributed(forward), reading(inputs, module_of(forward)):
        if projections is not None and seeds is None:
            device = generator.device if generator is not None else "cpu"
            seeds = torch.randint(2**32, (len(inputs),), generator=generator, device=device)
        for start in range(0, len(inputs), batch_size):
            part = slice(start, start + batch_size)
            values.append(
                _squared_norms(
                    forward,
                    inputs[part].detach(),
                    output,
                    None if labels is None else labels[part],
                    projections,
                    None if seeds is None else seeds[part].tolist(),
                    check=start == 0,
                )
            )
    return torch.cat(values) if values else inputs.new_zeros(0, dtype=at_least_float32(inputs.dtype))


def check_forward(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, output: str = "logits", labels: Tensor | None = None
) -> None:
    """Raise, as :func:`gbr` does, if ``forward`` is random or samples depend on each other.

    Call it once before many calls of :func:`squared_norms` or of an attack, which do not check.

    Args:
        forward, inputs, output, labels: As in :func:`gbr`. The first 8 samples are used. With fewer than three, a
            dependence on earlier or on later samples may be missed.
    """
    x = inputs[:8].detach()
    with reading(x):
        _squared_norms(forward, x, output, None if labels is None else labels[:8], 1, list(range(len(x))), check=True)


def squared_norms(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    output: str = "logits",
    labels: Tensor | None = None,
    projections: int | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """:func:`gbr` of one batch, without the checks of :func:`check_forward`."""
    with reading(inputs):
        given = None if seeds is None else seeds.tolist()
        return _squared_norms(forward, inputs.detach(), output, labels, projections, given, check=False)


def _squared_norms(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    output: str,
    labels: Tensor | None,
    projections: int | None,
    seeds: list[int] | None,
    check: bool,
) -> Tensor:
    """:func:`gbr` of one batch; ``check`` as in :func:`check_forward`."""

    def graph(part: slice) -> tuple[Tensor, Tensor]:
        return _graph(forward, inputs[part], output, None if labels is None else labels[part], check)

    with refuse_random(forward, inputs) if check else nullcontext():
        x, out = graph(slice(None))
    directions, scale = seeded_directions(out.shape[1], projections, seeds, out)
    total = torch.zeros(len(x), dtype=at_least_float32(x.dtype), device=x.device)
    check = check and len(x) > 1
    for i, direction in enumerate(directions):
        keep = i + 1 < len(directions)
        if check and i == 0:
            gradient = _checked_gradient(graph, x, out, direction, keep)
        else:
            gradient = gradient_of(out, x, direction, keep)
        total += gradient.reshape(len(x), -1).to(total.dtype).square().sum(1)
    return total * scale


def _checked_gradient(
    graph: Callable[[slice], tuple[Tensor, Tensor]], x: Tensor, out: Tensor, direction: Tensor, keep: bool
) -> Tensor:
    """Gradient along ``direction``. Also checks, almost for free, that no sample's output depends on another sample.

    The outputs of the sample in the middle are left out of the sum. The gradient of its input is then exactly zero,
    unless other samples' outputs depend on it. Its own gradient is computed separately.
    """
    index = len(x) // 2
    middle = slice(index, index + 1)
    others = direction.clone()
    others[middle] = 0
    gradient = gradient_of(out, x, others, keep)
    # In a diverged network, zero times Inf gives NaN, which is not a sign of a dependence.
    if gradient[middle].nan_to_num(0, 0, 0).any():
        raise ValueError(
            "forward: expected each sample's output to depend on that sample alone, but it depends on other samples of "
            "the batch; look for batch statistics, or operations along dimension 0"
        )
    own_x, own_out = graph(middle)
    own = gradient_of(own_out, own_x, direction[middle])
    return torch.cat([gradient[:index], own, gradient[index + 1 :]])


def _graph(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, output: str, labels: Tensor | None, check: bool
) -> tuple[Tensor, Tensor]:
    """A leaf tensor with the values of ``inputs``, and the outputs ``(N, C)`` to differentiate, with their graph.

    ``check`` reads the outputs, which waits for the device.
    """
    x, out = _leaf_and_output(forward, inputs)
    if not isinstance(out, Tensor) or out.is_complex():
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"forward: expected a callable that returns a tensor (N, C) of real numbers, got {got}")
    if out.ndim == 0 or len(out) != len(x):
        raise ValueError(f"forward: expected outputs of shape ({len(x)}, C), got {tuple(out.shape)}")
    shape, out = tuple(out.shape), out.reshape(len(x), -1)
    if output != "logits":
        if out.shape[1] < 2 or out.shape[1] != shape[1]:
            raise ValueError(
                f"output: {output!r} is a softmax over dimension 1 of outputs (N, C), C >= 2, got outputs of shape "
                f"{shape}; compute the probabilities in forward (softmax, sigmoid) and measure 'logits'"
            )
        if check and len(out) and bool((out.detach() >= 0).all() and (out.detach().sum(1) - 1).abs().max() < 1e-4):
            raise ValueError(
                f"output: {output!r} is the softmax of the outputs, which are probabilities already (each row sums to "
                "1); leave the softmax out of forward, or measure 'logits', the outputs as they are"
            )
        # The derivative p (1 - p) of a confident prediction would be rounding error in float32.
        out = out.softmax(1, dtype=torch.float64)
    if output == "label_prob" and labels is not None:
        check_class_numbers("labels", labels, out.shape[1])
        out = out.gather(1, labels.to(out.device).long()[:, None])
    return x, out


def _leaf_and_output(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the values of ``inputs``, and the output of ``forward`` for it."""
    x = inputs.clone()
    channels_last = x.ndim == 4 and x.device.type == "cpu"
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)  # makes convolutions 5 to 25 % faster
    x.requires_grad_()
    try:
        return x, output_of(forward, x)
    except RuntimeError as error:
        if not channels_last or "view size is not compatible" not in str(error):
            raise
    x = inputs.clone(memory_format=torch.contiguous_format).requires_grad_()  # forward calls view() on its input
    return x, output_of(forward, x)


def _check_samples(inputs: Tensor, output: str, labels: Tensor | None, seeds: Tensor | None) -> None:
    check_floating_tensor("inputs", inputs, "; convert them with inputs.float()")
    check_type("labels", labels, (Tensor, type(None)), "a tensor of class numbers or None")
    check_type("seeds", seeds, (Tensor, type(None)), "a tensor of integers or None")
    if inputs.ndim == 0:
        raise ValueError("inputs: expected a batch (N, ...), got a scalar")
    if output == "label_prob" and (labels is None or labels.shape != inputs.shape[:1] or not holds_integers(labels)):
        got = "None" if labels is None else f"shape {tuple(labels.shape)} of {labels.dtype}"
        raise ValueError(f"labels: 'label_prob' needs {len(inputs)} class numbers, got {got}")
    if seeds is not None and (seeds.shape != inputs.shape[:1] or not holds_integers(seeds)):
        raise ValueError(f"seeds: expected {len(inputs)} integers, got shape {tuple(seeds.shape)} of {seeds.dtype}")
    if seeds is not None and seeds.numel() and not 0 <= int(seeds.min()) <= int(seeds.max()) < 2**32:
        raise ValueError(f"seeds: expected integers from 0 to 2^32 - 1, got {int(seeds.min())}..{int(seeds.max())}")


def check_output(output: str) -> None:
    """Raise ``ValueError`` unless ``output`` is one of ``OUTPUTS``."""
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(map(repr, OUTPUTS))}, got {output!r}")


def check_projections(projections: int | None) -> None:
    """Raise unless ``projections`` is None (exact) or a positive integer."""
    check_integer("projections", projections, 1, none="exact")
