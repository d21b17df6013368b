"""The paper's equations on plain tensors; imports torch alone."""

from .attack import fgsm, pgd
from .decay import shift_direction, shifted_l2_grad
from .weights import VARIANTS, enc_weight

__all__ = ["VARIANTS", "enc_weight", "fgsm", "pgd", "shift_direction", "shifted_l2_grad"]
