"""ENC layers: torch's convolutions and linear layer, computing with the effective weight instead of ``weight``.

They are subclasses of torch's layers and not parametrizations (``torch.nn.utils.parametrize``), for three reasons:

- Initialisers (mmengine's Kaiming finds layers by class name) fill ``layer.weight`` in place. In a parametrized layer
  that is a computed tensor, so the free weight W would not be initialised.
- A parametrization renames the key ``weight`` to ``parametrizations.weight.original``, so checkpoints of plain layers
  would not load.
- torch does not pickle parametrized layers, so whole models could not be saved or sent to other processes.

A *stock* layer or class is torch's own, or a subclass of it from another library; a *plain* layer is one without ENC.
"""

from .attributes import lacks_attribute
from .effective import POST_NORM_KEYS
from .enc_layer import ENCLayer, enc_layers, living_layers
from .merged_norms import RefusesRescaledRows, batch_norm_affine, running_statistics
from .stock import ENC_LAYERS, ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear, StockLayer
from .subclasses import enc_class, reserved_attributes

__all__ = [
    "ENC_LAYERS",
    "ENCConv1d",
    "ENCConv2d",
    "ENCConv3d",
    "ENCLayer",
    "ENCLinear",
    "POST_NORM_KEYS",
    "RefusesRescaledRows",
    "StockLayer",
    "batch_norm_affine",
    "enc_class",
    "enc_layers",
    "lacks_attribute",
    "living_layers",
    "reserved_attributes",
    "running_statistics",
]
