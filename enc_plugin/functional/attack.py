r"""White-box attacks in the L-inf ball: FGSM (one gradient) and PGD (several)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_class_numbers, check_floating_tensor, check_integer, check_number, check_type, holds_integers
from .eval_mode import require_eval_mode
from .precision import full_float32

MAX_STEPS = 10_000  # a slip of zeros would run for days
LEAST_EPS = 0.5  # grey levels

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
    r"""Fast gradient sign method (Goodfellow et al., arXiv:1412.6572): untargeted, one step to the corner of the ball.

    .. math:: x' = \mathrm{clip}(x + \epsilon \, \mathrm{sign} \, \nabla_x \ell(f(x), y), \; lower, \; upper)

    with sign(0) = 0. One gradient serves any number of ``eps``. Nothing but the returned tensors changes: gradients of
    parameters, modes and random state stay as they were; it works within ``torch.no_grad()`` and autocast too. Float32
    computes without TensorFloat-32.

    Args:
        forward: Maps images to logits ``(N, C)``; whatever normalises the images belongs within. In eval mode.
        images: Pixels x, ``(N, ...)``, floating point, within ``[lower, upper]``.
        labels: True classes y, ``(N,)`` integers.
        eps: Largest change of a pixel, in the unit of ``images`` (8 / 255 for the range 0..1, 8 for 0..255); a number,
            or a sequence. Below half a grey level of 0..255 a warning says that the unit may be the other one.
        lower: Smallest possible pixel value.
        upper: Largest possible pixel value.
        loss: ``'cross_entropy'``, or a callable that takes logits and labels and returns a loss, ``(N,)`` or summed.

    Returns:
        Adversarial images, of the shape, dtype and device of ``images``; for a sequence of ``eps`` a list of them.

    Raises:
        ValueError: If the model is in train mode, images lie outside the bounds, ``eps`` exceeds the range, a label is
            no class, or the output is not a differentiable function of the images.
        TypeError: If ``images`` are integers, or an argument is of another type.

    Example:
        >>> images, labels = torch.tensor([[0.5, 0.9]]), torch.tensor([0])
        >>> fgsm(lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]]), images, labels, eps=0.25)
        tensor([[0.2500, 1.0000]])
    """
    budgets = _checked_budgets(images, labels, eps, lower, upper)
    lower, upper = float(lower), float(upper)
    gradient, _ = input_gradient(forward, images, labels, loss=loss)
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
    r"""Projected gradient descent (Madry et al., arXiv:1706.06083): FGSM in small steps, each projected onto the ball.

    .. math:: x_{t+1} = \Pi_{\lVert x' - x \rVert_\infty \le \epsilon,\; lower \le x' \le upper}
        (x_t + a \, \mathrm{sign} \, \nabla_{x_t} \ell(f(x_t), y))

    A stronger attack than :func:`fgsm`, which is known to overrate robustness, at ``steps`` gradients for every
    ``eps``. The last iterate is returned. It leaves no trace either.

    Args:
        forward: As in :func:`fgsm`.
        images: As in :func:`fgsm`.
        labels: As in :func:`fgsm`.
        eps: As in :func:`fgsm`; each value of a sequence is attacked from the start.
        steps: Number of gradients, 1 to 9,999.
        step_size: Change of a pixel in one step (a), in the unit of ``images``; None: ``2.5 * eps / steps``, which lets
            any point of the ball be reached.
        random_start: Start from a uniformly random point of the ball, within the bounds; else from the images.
        generator: Source of the random start, on the device of ``images``. None: one of its own, seeded with 0 for each
            ``eps``, so that torch's global random state stays as it was.
        lower: As in :func:`fgsm`.
        upper: As in :func:`fgsm`.
        loss: As in :func:`fgsm`.

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
        check_number("step_size", step_size, "a positive finite number or None", lambda value: 0 < value < float("inf"))
    check_type("random_start", random_start, bool, "True or False")
    check_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator or None")

    images = images.detach()
    adversarial = []
    for budget in budgets:
        step = 2.5 * budget / steps if step_size is None else float(step_size)
        x = images
        if random_start:
            source = torch.Generator(images.device).manual_seed(0) if generator is None else generator
            # rand and not uniform_: it draws the same numbers however the images are laid out in memory.
            offset = torch.rand(images.shape, generator=source, dtype=images.dtype, device=images.device) * 2 - 1
            x = (images + budget * offset).clamp(lower, upper)
        for _ in range(steps):
            gradient, _ = input_gradient(forward, x, labels, loss=loss)
            change = (x + step * _sign(gradient) - images).clamp(-budget, budget)
            x = (images + change).clamp(lower, upper)
        adversarial.append(x)
    return adversarial[0] if _is_one_budget(eps) else adversarial


def input_gradient(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, loss: Loss = "cross_entropy"
) -> tuple[Tensor, Tensor]:
    r"""Gradient of the summed loss with respect to the images: what every attack here is made of.

    The loss is summed and not averaged, so that an image's gradient does not depend on the batch around it, and taken
    in float32 at least, so that half precision does not flush it to zero. Float32 computes without TensorFloat-32.

    Args:
        forward: As in :func:`fgsm`.
        images: As in :func:`fgsm`.
        labels: As in :func:`fgsm`.
        loss: As in :func:`fgsm`.

    Returns:
        The gradient, of the shape, dtype and device of ``images``, and the logits ``(N, C)`` that came with it.

    Raises:
        ValueError: If the model is in train mode, or the output is not a differentiable function of the images.
    """
    check_type("forward", forward, Callable, "a model or another callable")
    if not callable(loss) and not (isinstance(loss, str) and loss == "cross_entropy"):
        raise ValueError(f"loss: expected 'cross_entropy' or a callable, got {loss!r}")
    # Callers may be in no_grad or inference mode (validation loops are).
    with torch.inference_mode(False), torch.enable_grad(), full_float32(), require_eval_mode(forward):
        # Clones: inference tensors cannot be saved. int64: torch's losses take no other integers.
        x, labels = images.detach().clone().requires_grad_(), labels.to(torch.int64, copy=True)
        logits = forward(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"forward: expected logits of shape ({len(images)}, C), got {got}")
        if not callable(loss):
            check_class_numbers("labels", labels, logits.shape[1])
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        total = loss(scores, labels) if callable(loss) else F.cross_entropy(scores, labels, reduction="sum")
        check_type("loss", total, Tensor, "a callable that returns a tensor")
        total = total.sum()
        gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise ValueError(
                "forward: its output does not depend on the images in a way that autograd sees; "
                "look for no_grad, detach, NumPy or rounding within"
            )
    return gradient, logits.detach()


def sign_step(images: Tensor, gradient: Tensor, eps: float, *, lower: float, upper: float) -> Tensor:
    """``clip(images + eps * sign(gradient), lower, upper)``, with sign(0) = 0."""
    return (images.detach() + eps * _sign(gradient)).clamp_(lower, upper)


def _sign(gradient: Tensor) -> Tensor:
    """Sign of each element; 0 for NaN as well, so that a network that has diverged leaves valid images."""
    return gradient.sign().nan_to_num_(nan=0.0)


def _is_one_budget(eps: float | Tensor | Sequence[float]) -> bool:
    """Whether ``eps`` is one budget: a number, or a tensor or array without dimensions."""
    return isinstance(eps, Real) or getattr(eps, "ndim", None) == 0


def _warn_of_other_unit(budgets: Sequence[float], scale: float) -> None:
    """Warn of budgets below half a grey level of pixels in 0..255, which 8 / 255 of the range looks like."""
    small = [budget for budget in budgets if 0 < budget < LEAST_EPS]
    if small and scale == 255:
        warnings.warn(f"eps: {other_unit(small[0])}", stacklevel=4)


def other_unit(eps: float) -> str:
    """What is suspect about ``eps`` below half a grey level, and the value that may have been meant."""
    return (
        f"{eps:.4g} is below half a grey level, which rounding to pixels undoes, because the unit is 1/255 of the "
        f"range; if {eps:.4g} of the range was meant, it is eps={eps * 255:.4g}"
    )


def _checked_budgets(
    images: Tensor, labels: Tensor, eps: float | Sequence[float], lower: float, upper: float
) -> list[float]:
    """Refuse what would attack something else than meant; the values of ``eps`` as a list."""
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
    _warn_of_other_unit(budgets, upper - lower)
    if images.numel():
        low, high = (bound.item() for bound in images.detach().aminmax())
        if not (lower <= low and high <= upper):
            raise ValueError(
                f"images: expected pixels within [{lower:g}, {upper:g}], got [{low:g}, {high:g}]; attack pixels as "
                "they are stored and put the normalisation into forward, or state their range with lower and upper"
            )
    return budgets
