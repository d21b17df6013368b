"""ENC layers: the stock layers with the same keys, computing with the effective weight of eq. 20-23.

They are subclasses of the stock layers and not parametrizations (``torch.nn.utils.parametrize``), for three reasons:

- Initialisers (mmengine's Kaiming finds layers by class name) fill ``layer.weight`` in place. In a parametrized layer
  that is a computed tensor, so W stays as it was.
- The key ``weight`` becomes ``parametrizations.weight.original``, so checkpoints of stock layers do not load.
- torch refuses to pickle parametrized layers: whole models could not be saved or sent to other processes.
"""

from .attributes import lacks_attribute
from .effective import POST_NORM_KEYS
from .enc_layer import ENCLayer, enc_layers
from .merged_norms import RefusesRescaledRows, batch_norm_affine
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
    "reserved_attributes",
]
