r"""White-box attacks in the L-inf ball: FGSM (one gradient) and PGD (several)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from .checks import check_class_numbers, check_floating_tensor, check_integer, check_number, check_type, holds_integers
from .eval_mode import require_eval_mode, undistributed
from .reading import gradient_of, output_of, reading

MAX_STEPS = 10_000  # exclusive; a typing error in the number of steps would otherwise run for days
LEAST_EPS = 0.5  # in grey levels; below it, eps was probably given in another unit

Loss = str | Callable[[Tensor, Tensor], Tensor]


def fgsm(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    eps: float | Sequence[float],
    *,
    lower: float = 0.0,
    upper: float = 1.0,
    loss: Loss = "cross_entropy",
) -> Tensor | list[Tensor]:
    r"""Fast gradient sign method (Goodfellow et al., arXiv:1412.6572): an untargeted attack with one gradient.

    .. math:: x' = \mathrm{clip}(x + \epsilon \, \mathrm{sign} \, \nabla_x \ell(f(x), y), \; lower, \; upper)

    with sign(0) = 0. All values of ``eps`` share one gradient. The call has no side effects: gradients of parameters,
    modes and random states do not change. It also works within ``torch.no_grad()``. Float32 is computed without
    TensorFloat-32, and without an autocast around the call.

    Args:
        forward: Maps images to logits ``(N, C)``, including the normalisation of the images. In eval mode.
        images: Pixels x, ``(N, ...)``, floating point, within ``[lower, upper]``.
        labels: True classes y, ``(N,)`` integers.
        eps: Largest change of a pixel, in the unit of ``images`` (8 / 255 for the range 0..1, 8 for 0..255); a number
            or a sequence. For the range 0..255, a value below 0.5 gives a warning that the unit may be wrong.
        lower: Smallest possible pixel value.
        upper: Largest possible pixel value.
        loss: ``'cross_entropy'``, or a callable that takes logits and labels and returns a loss, ``(N,)`` or summed.

    Returns:
        Adversarial images, of the shape, dtype and device of ``images``; for a sequence of ``eps`` a list of them.

    Raises:
        ValueError: If the model is in train mode, a batch norm keeps no running statistics, images lie outside the
            bounds, ``eps`` exceeds the range, a label is not a class, or the output is not a differentiable function of
            the images.
        TypeError: If ``images`` are integers, or an argument has the wrong type.

    Example:
        >>> images, labels = torch.tensor([[0.5, 0.9]]), torch.tensor([0])
        >>> fgsm(lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]]), images, labels, eps=0.25)
        tensor([[0.2500, 1.0000]])
    """
    budgets = _checked_budgets(images, labels, eps, lower, upper)
    lower, upper = float(lower), float(upper)
    gradient, _ = input_gradient(forward, images, labels, loss=loss)
    _warn_of_zeros(gradient)
    adversarial = [sign_step(images, gradient, budget, lower=lower, upper=upper) for budget in budgets]
    return adversarial[0] if _is_one_budget(eps) else adversarial


def pgd(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    eps: float | Sequence[float],
    *,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    loss: Loss = "cross_entropy",
) -> Tensor | list[Tensor]:
    r"""Projected gradient descent (Madry et al., arXiv:1706.06083): FGSM in several steps within the L-inf ball.

    .. math:: x_{t+1} = \Pi_{\lVert x' - x \rVert_\infty \le \epsilon,\; lower \le x' \le upper}
        (x_t + a \, \mathrm{sign} \, \nabla_{x_t} \ell(f(x_t), y))

    A stronger attack than :func:`fgsm`, which is known to overestimate robustness. It takes ``steps`` gradients for
    each ``eps`` and returns the last iterate. Like :func:`fgsm`, it has no side effects.

    Args:
        forward, images, labels, lower, upper, loss: As in :func:`fgsm`.
        eps: As in :func:`fgsm`; each value of a sequence is attacked from the start.
        steps: Number of gradients, 1 to 9,999.
        step_size: Change of a pixel in one step (a), in the unit of ``images``. None: ``2.5 * eps / steps``, with which
            the attack can reach every point of the ball.
        random_start: Start from a uniformly random point of the ball, clipped to the bounds; else from the images.
        generator: Generator of the random start, on the device of ``images``. None: a new generator with seed 0 for
            each ``eps``; the global random state is not used.

    Returns:
        As :func:`fgsm`.

    Raises:
        ValueError: As :func:`fgsm`, and if ``steps`` or ``step_size`` is not positive.
        TypeError: As :func:`fgsm`.

    Example:
        >>> images, labels = torch.tensor([[0.5, 0.9]]), torch.tensor([0])
        >>> pgd(lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]]), images, labels, eps=0.25)
        tensor([[0.2500, 1.0000]])
    """
    budgets = _checked_budgets(images, labels, eps, lower, upper)
    lower, upper = float(lower), float(upper)
    check_integer("steps", steps, 1, below=MAX_STEPS)
    if step_size is not None:
        check_number("step_size", step_size, "a positive finite number or None", lambda value: 0 < value < math.inf)
    check_type("random_start", random_start, bool, "True or False")
    check_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator or None")

    images = images.detach()
    adversarial = []
    for budget in budgets:
        step = 2.5 * budget / steps if step_size is None else float(step_size)
        x = images
        if random_start:
            source = torch.Generator(images.device).manual_seed(0) if generator is None else generator
            # rand and not uniform_, because its numbers do not depend on the memory format of the images.
            offset = torch.rand(images.shape, generator=source, dtype=images.dtype, device=images.device) * 2 - 1
            x = (images + budget * offset).clamp(lower, upper)
        for number in range(steps):
            gradient, _ = input_gradient(forward, x, labels, loss=loss)
            if number == 0:
                _warn_of_zeros(gradient)
            change = (x + step * _sign(gradient) - images).clamp(-budget, budget)
            x = (images + change).clamp(lower, upper)
        adversarial.append(x)
    return adversarial[0] if _is_one_budget(eps) else adversarial


def input_gradient(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, loss: Loss = "cross_entropy"
) -> tuple[Tensor, Tensor]:
    r"""Gradient of the summed loss with respect to the images; of the cross entropy, up to a factor for each image.

    The loss is summed, not averaged, so an image's gradient does not depend on the size of its batch. It is computed in
    float32 or float64, also of logits in half precision. TensorFloat-32 is not used, nor autocast, unless ``forward``
    itself or images in half precision ask for it. That of the cross entropy is divided by ``1 - p``, where p is the
    probability of the true class. No sign changes by that, and it stays exact where ``1 - p`` would be rounding error.

    Args:
        forward, images, labels, loss: As in :func:`fgsm`.

    Returns:
        The gradient, of the shape, dtype and device of ``images``, and the logits ``(N, C)`` of the same forward pass.

    Raises:
        ValueError: If the model is in train mode, or the output is not a differentiable function of the images.
    """
    check_type("forward", forward, Callable, "a model or another callable")
    if not callable(loss) and not (isinstance(loss, str) and loss == "cross_entropy"):
        raise ValueError(f"loss: expected 'cross_entropy' or a callable, got {loss!r}")
    with require_eval_mode(forward), undistributed(forward), reading(images):
        # Clones, because inference tensors cannot be saved for backward; int64, because torch's losses require it.
        x, labels = images.detach().clone().requires_grad_(), labels.to(torch.int64, copy=True)
        logits = output_of(forward, x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"forward: expected logits of shape ({len(images)}, C), got {got}")
        if not callable(loss):
            if logits.shape[1] == 1:
                raise ValueError(
                    "forward: expected at least 2 logits, got 1, whose cross entropy is always 0; pass a loss of one "
                    "logit, such as loss=lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float())"
                )
            check_class_numbers("labels", labels, logits.shape[1])
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        total = loss(scores, labels) if callable(loss) else _log_odds(scores, labels)
        check_type("loss", total, Tensor, "a callable that returns a tensor")
        gradient = gradient_of(total.sum(), x)
    return gradient, logits.detach()


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``log((1 - p) / p)``, ``(N,)``; its gradient is that of the cross entropy ``-log(p)``, divided by ``1 - p``."""
    own = labels[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own)[:, 0]


def sign_step(images: Tensor, gradient: Tensor, eps: float, *, lower: float, upper: float) -> Tensor:
    """``clip(images + eps * sign(gradient), lower, upper)``, with sign(0) = 0."""
    return (images.detach() + eps * _sign(gradient)).clamp_(lower, upper)


def _sign(gradient: Tensor) -> Tensor:
    """Sign of each element; 0 for NaN as well, so that a network that has diverged leaves valid images."""
    return gradient.sign().nan_to_num_(nan=0.0)


def _warn_of_zeros(gradient: Tensor) -> None:
    if gradient.numel() and not gradient.any():
        warnings.warn(
            "forward: the gradients of all images are exactly 0, so the attack cannot change them, which does not mean "
            "that the network is robust; look for rounding (of pixels or activations) in forward, and for a loss of "
            "your own that is flat",
            stacklevel=3,
        )


def _is_one_budget(eps: float | Tensor | Sequence[float]) -> bool:
    """Whether ``eps`` is one budget: a number, or a tensor or array without dimensions."""
    return isinstance(eps, Real) or getattr(eps, "ndim", None) == 0


def other_unit(eps: float) -> str:
    """Warning for an ``eps`` below ``LEAST_EPS`` grey levels, with the value that was probably meant."""
    return (
        f"{eps:.4g} is below half a grey level, so rounding to pixels undoes the attack; eps is in grey levels (1/255 "
        f"of the pixel range); for {eps:.4g} of the range, use eps={eps * 255:.4g}"
    )


def _checked_budgets(
    images: Tensor, labels: Tensor, eps: float | Sequence[float], lower: float, upper: float
) -> list[float]:
    """Check the arguments and return the values of ``eps`` as a list."""
    check_floating_tensor("images", images, "; convert them with images.float()")
    if images.ndim == 0:
        raise ValueError("images: expected a batch (N, ...), got a scalar")
    check_type("labels", labels, Tensor, "a tensor of class numbers")
    if labels.shape != images.shape[:1] or not holds_integers(labels):
        raise ValueError(
            f"labels: expected {len(images)} class numbers, got shape {tuple(labels.shape)} of {labels.dtype}"
        )
    largest = torch.finfo(images.dtype).max
    for name, value in (("lower", lower), ("upper", upper)):
        check_number(name, value, f"a number of {images.dtype}", lambda v: -largest <= v <= largest)
    if not lower < upper:
        raise ValueError(f"lower, upper: expected lower < upper, got {lower!r}, {upper!r}")
    if not _is_one_budget(eps) and (
        isinstance(eps, (str, bytes)) or not (isinstance(eps, Sequence) or hasattr(eps, "ndim"))
    ):
        raise TypeError(f"eps: expected a number or a sequence of numbers, got {eps!r}")
    budgets: list[Any] = [eps] if _is_one_budget(eps) else list(cast(Sequence[float], eps))
    for i, budget in enumerate(budgets):
        if getattr(budget, "ndim", None) == 0:
            budgets[i] = budget = budget.item()
        check_number("eps", budget, "a number or a sequence of numbers", lambda value: True)
        if not 0 <= budget <= upper - lower:
            raise ValueError(
                f"eps: expected numbers from 0 to upper - lower = {upper - lower:g}, got {budget!r}; eps has the unit "
                "of the images (8 / 255 of the range is 8 / 255 for pixels in 0..1, and 8 for pixels in 0..255)"
            )
    small = [budget for budget in budgets if 0 < budget < LEAST_EPS]
    if small and upper - lower == 255:
        warnings.warn(f"eps: {other_unit(small[0])}", stacklevel=3)
    if images.numel():
        low, high = (bound.item() for bound in images.detach().aminmax())
        rounding = 4 * torch.finfo(images.dtype).eps * max(abs(lower), abs(upper))  # of a normalisation that was undone
        if not (lower - rounding <= low and high <= upper + rounding):
            raise ValueError(
                f"images: expected pixels within [{lower:g}, {upper:g}], got [{low:g}, {high:g}]; pass images before "
                "normalisation and normalise them in forward, or set lower and upper to the range of the images"
            )
    return budgets
