"""mmpretrain's image classifier with a penalty on the GBR, and its ENC version."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor

from ..convert import enc_layers, to_enc
from ..functional.checks import check_type
from ..layers.origin import UNKNOWN
from ..surgery.conversion_report import FrozenWarning
from ..surgery.projected import check_constrained
from .gbr_penalty import GBRPenalty


@MODELS.register_module()
class GBRImageClassifier(ImageClassifier):
    """``ImageClassifier`` that can add a :class:`GBRPenalty` on its logits to the loss, logged as ``loss_gbr``.

    The penalty is on derivatives with respect to the normalised input. It shares the forward pass of the loss, so batch
    norms are in train mode and couple the samples of a batch. It does not work with activation checkpointing.

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``.
        gbr_penalty: Options of :class:`GBRPenalty`; None: no penalty.
    """

    def __init__(self, *args, gbr_penalty: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_type("gbr_penalty", gbr_penalty, (dict, type(None)), "a dict of options or None")
        self.gbr_penalty = None if gbr_penalty is None else GBRPenalty(**gbr_penalty)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Losses of the head, and ``loss_gbr``."""
        if self.gbr_penalty is None:
            return super().loss(inputs, data_samples)
        inputs = inputs.detach().requires_grad_()
        logits: list[Tensor] = []
        # Take the logits from the head's loss: a second forward pass would update its batch norm twice.
        handle = self.head.register_forward_hook(lambda head, args, out: logits.append(out))
        try:
            # A clone, because some networks start with an in-place operation, which a leaf does not allow.
            losses = super().loss(inputs.clone(), data_samples)
        finally:
            handle.remove()
        if len(logits) != 1 or not isinstance(logits[0], Tensor):
            raise TypeError(
                f"gbr_penalty: expected {type(self.head).__name__} to compute one tensor of logits for its loss, got "
                f"{[type(x).__name__ for x in logits]}; use a head like LinearClsHead"
            )
        losses["loss_gbr"] = self.gbr_penalty(inputs, logits[0])
        return losses


@MODELS.register_module()
class ENCImageClassifier(GBRImageClassifier):
    """``ImageClassifier`` with ENC convolutions and linear layers. One line turns a stock config into an ENC config:

    >>> _base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'  # doctest: +SKIP
    >>> model = dict(type='ENCImageClassifier', enc=dict(variant='ws'))  # doctest: +SKIP

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``, and ``gbr_penalty`` (:class:`GBRImageClassifier`).
        enc: Options of :func:`enc_plugin.to_enc`: ``variant``, ``alpha``, ``include``, ``exclude``, ``post_norm``,
            ``how``, ``packed``. Patterns match names as in ``named_modules()``: ``'backbone'``, ``'head.fc'``.
            ``preserve=True`` is for fine-tuning: whenever plain weights are loaded (``load_from``, ``init_cfg``), it
            keeps the function of their network, and logs how well.

    Attributes:
        enc_report: The :class:`enc_plugin.ConversionReport`.
    """

    def __init__(self, *args, enc: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_type("enc", enc, (dict, type(None)), "a dict of options of to_enc, or None")
        self.enc = dict(enc or {})
        # Before weights are loaded, there is no function to preserve, nor to lose.
        with warnings.catch_warnings(), _in_eval_mode(self):
            warnings.simplefilter("ignore", FrozenWarning)
            self.enc_report = to_enc(self, **{**self.enc, "preserve": False})
        for _, layer in enc_layers(self):
            layer.keeps_function = bool(self.enc.get("preserve"))
        self.register_load_state_dict_post_hook(_keep_plain_function)

    def init_weights(self) -> None:
        """Initialise as the stock model does, then raise ``ValueError`` if a weight cannot be normalised."""
        for _, layer in enc_layers(self):
            layer.loaded_settings = None
        super().init_weights()
        check_constrained(self)
        # A backbone that loads its own weights (init_cfg) does not call the load hook of this model.
        _keep_plain_function(self)

    def become_plain(self) -> None:
        """Turn into the stock ``ImageClassifier``, in place; :func:`enc_plugin.fold` calls this."""
        for name in ("enc", "enc_report", "gbr_penalty"):
            delattr(self, name)
        for key, hook in list(self._load_state_dict_post_hooks.items()):
            if hook is _keep_plain_function:
                del self._load_state_dict_post_hooks[key]
        self.__class__ = ImageClassifier


def _keep_plain_function(model: ENCImageClassifier, incompatible_keys=None) -> None:
    """Load hook: with ``preserve``, convert plain weights that have just been loaded without changing the function."""
    if not model.enc.get("preserve"):
        return
    loaded = {name: layer.loaded_settings for name, layer in enc_layers(model)}
    plain = [name for name, settings in loaded.items() if settings == {}]
    unknown = [name for name, settings in loaded.items() if settings == UNKNOWN]
    if plain and unknown:
        raise ValueError(
            f"checkpoint: its layer {unknown[0]!r} was ENC, but its entry '_extra_state' is missing or damaged, so "
            f"layers without such an entry, like {plain[0]!r}, may be plain or ENC; load the checkpoint as it was "
            "saved, or, if all its layers are ENC, load it without preserve"
        )
    if plain:
        with _in_eval_mode(model):
            model.enc_report = to_enc(model, **model.enc)
        print_log(f"ENC: loaded plain weights; {model.enc_report.preserved}", logger="current")


@contextmanager
def _in_eval_mode(model: ImageClassifier) -> Iterator[None]:
    """Context in which ``eval()`` was called, without which LeViT and EfficientFormer do not run in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # undoes what networks prepare in eval()
        for module, mode in modes:
            module.training = mode
