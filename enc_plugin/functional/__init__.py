"""The paper's equations on plain tensors; imports torch alone."""

from .decay import shift_direction, shifted_l2_grad
from .weights import VARIANTS, enc_weight

__all__ = ["VARIANTS", "enc_weight", "shift_direction", "shifted_l2_grad"]
