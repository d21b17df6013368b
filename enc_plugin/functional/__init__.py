"""The paper's equations as functions of plain tensors. Depends only on torch."""

from .attack import fgsm, pgd
from .bounds import bound_chain, residual_log_bound, robustness_delta, robustness_gap
from .decay import decay_efolds, shift_direction, shifted_l2_grad
from .jacobian import gbr
from .linear_maps import conv_map_sq_norm, map_spectral_norm
from .penalty import gbr_penalty
from .weights import VARIANTS, enc_weight

__all__ = [
    "VARIANTS",
    "bound_chain",
    "conv_map_sq_norm",
    "decay_efolds",
    "enc_weight",
    "fgsm",
    "gbr",
    "gbr_penalty",
    "map_spectral_norm",
    "pgd",
    "residual_log_bound",
    "robustness_delta",
    "robustness_gap",
    "shift_direction",
    "shifted_l2_grad",
]
