"""mmpretrain's image classifier that makes itself an ENC network."""

from __future__ import annotations

from mmengine.registry import MODELS
from mmpretrain.models.classifiers import ImageClassifier

from ..convert import check_normalizable, enc_layers, to_enc


@MODELS.register_module()
class ENCImageClassifier(ImageClassifier):
    """``ImageClassifier`` whose convolutions and linear layers are ENC: one line turns a stock config into an ENC one.

    >>> _base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'  # doctest: +SKIP
    >>> model = dict(type='ENCImageClassifier', enc=dict(variant='ws'))  # doctest: +SKIP

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``.
        enc: Options of :func:`enc_plugin.to_enc`: ``variant``, ``alpha``, ``include``, ``exclude``, ``post_norm``.
            Patterns match names as in ``named_modules()``: ``'backbone'``, ``'head.fc'``.

    Attributes:
        enc_report: The :class:`enc_plugin.ConversionReport`.
    """

    def __init__(self, *args, enc: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.enc_report = to_enc(self, **(enc or {}))

    def init_weights(self) -> None:
        """Initialise as the stock model does, then refuse weights that cannot be normalised."""
        super().init_weights()
        for name, layer in enc_layers(self):
            check_normalizable(name, layer.weight, layer.variant)
