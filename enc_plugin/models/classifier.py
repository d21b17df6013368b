"""mmpretrain's image classifier with a penalty on the GBR, and one that makes itself an ENC network."""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmpretrain.models.classifiers import ImageClassifier
from torch import Tensor

from ..convert import enc_layers, to_enc
from ..functional.checks import check_type
from ..functional.normalizable import check_normalizable
from ..layers.origin import UNKNOWN
from ..surgery.projected import constrained_layers
from .gbr_penalty import GBRPenalty


@MODELS.register_module()
class GBRImageClassifier(ImageClassifier):
    """``ImageClassifier`` that can add a :class:`GBRPenalty` on its logits to the loss, logged as ``loss_gbr``.

    x is the normalised input. In train mode batch norms couple the samples of a batch; the penalty is on what training
    computes, so that one forward pass serves both. Without activation checkpointing only.

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``.
        gbr_penalty: Options of :class:`GBRPenalty`; None: no penalty, and training is the stock one.
    """

    def __init__(self, *args, gbr_penalty: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_type("gbr_penalty", gbr_penalty, (dict, type(None)), "a dict of options or None")
        self.gbr_penalty = None if gbr_penalty is None else GBRPenalty(**gbr_penalty)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's losses, and ``loss_gbr``."""
        if self.gbr_penalty is None:
            return super().loss(inputs, data_samples)
        inputs = inputs.detach().requires_grad_()
        logits: list[Tensor] = []
        # The head's own loss computes the logits: a second pass would update its batch norm twice.
        handle = self.head.register_forward_hook(lambda head, args, out: logits.append(out))
        try:
            losses = super().loss(inputs, data_samples)
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
    """``ImageClassifier`` whose convolutions and linear layers are ENC: one line turns a stock config into an ENC one.

    >>> _base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'  # doctest: +SKIP
    >>> model = dict(type='ENCImageClassifier', enc=dict(variant='ws'))  # doctest: +SKIP

    Args:
        *args, **kwargs: As for mmpretrain's ``ImageClassifier``, and ``gbr_penalty`` (:class:`GBRImageClassifier`).
        enc: Options of :func:`enc_plugin.to_enc`: ``variant``, ``alpha``, ``include``, ``exclude``, ``post_norm``, and
            ``how='project'``, which leaves the constraint to the optimizer and the layers stock. Patterns match names
            as in ``named_modules()``: ``'backbone'``, ``'head.fc'``. ``preserve=True`` keeps the function of plain
            weights whenever such are loaded (``load_from``, ``init_cfg``), and logs how well: fine-tuning with ENC.
            ``packed=False`` lets each layer compute its own weight on a GPU, too.

    Attributes:
        enc_report: The :class:`enc_plugin.ConversionReport`.
    """

    def __init__(self, *args, enc: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_type("enc", enc, (dict, type(None)), "a dict of options of to_enc, or None")
        self.enc = dict(enc or {})
        # There is no function to keep before weights are loaded.
        self.enc_report = to_enc(self, **{**self.enc, "preserve": False})
        for _, layer in enc_layers(self):
            layer.keeps_function = bool(self.enc.get("preserve"))
        self.register_load_state_dict_post_hook(_keep_plain_function)

    def init_weights(self) -> None:
        """Initialise as the stock model does, then refuse weights that cannot be normalised."""
        for _, layer in enc_layers(self):
            layer.loaded_settings = None
        super().init_weights()
        for name, layer in constrained_layers(self):
            check_normalizable(name, layer.weight, layer.enc_variant, layer.enc_kept)
        # A backbone that loads its own weights (init_cfg) does not call the hook of the whole.
        _keep_plain_function(self)

    def become_plain(self) -> None:
        """Turn into the stock ``ImageClassifier``, in place: the part of :func:`enc_plugin.fold` that is its own."""
        for name in ("enc", "enc_report", "gbr_penalty"):
            delattr(self, name)
        for key, hook in list(self._load_state_dict_post_hooks.items()):
            if hook is _keep_plain_function:
                del self._load_state_dict_post_hooks[key]
        self.__class__ = ImageClassifier


def _keep_plain_function(model: ENCImageClassifier, incompatible_keys=None) -> None:
    """Load hook: with ``preserve``, keep the function of the plain weights that have just been loaded."""
    if not model.enc.get("preserve"):
        return
    loaded = {name: layer.loaded_settings for name, layer in enc_layers(model)}
    plain = [name for name, settings in loaded.items() if settings == {}]
    unknown = [name for name, settings in loaded.items() if settings == UNKNOWN]
    if plain and unknown:
        raise ValueError(
            f"checkpoint: its layer {unknown[0]!r} was ENC, but its entry '_extra_state', which says so, is missing or "
            f"damaged, so layers without one, such as {plain[0]!r}, may be plain or ENC; load the checkpoint as it was "
            "saved, or an ENC one without preserve"
        )
    if plain:
        model.enc_report = to_enc(model, **model.enc)
        print_log(f"ENC: loaded plain weights; {model.enc_report.preserved}", logger="current")
