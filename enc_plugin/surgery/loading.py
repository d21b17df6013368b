"""Loading of checkpoints: which tensors a network really loaded, and whether they fit its ENC settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from ..layers import ENCLayer
from ..layers.origin import KEY, differing_settings, saved_settings, settings_text
from ..layers.reparametrized import WEIGHT_KEYS


class Loading:
    """Finds which tensors of ``model`` a load has changed. Create it before the load and read it after the load.

    Keys and shapes are not compared with the checkpoint, because load hooks of models rename keys, interpolate position
    embeddings and add missing entries. Instead, a tensor counts as loaded if it was replaced or written to (torch
    counts the writes).

    Args:
        model: The network, with or without a wrapper around it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        before = _loadable(model)
        self._before = {name: (tensor, tensor._version) for name, tensor in before.items()}
        # Some buffers (masks) are infinite on purpose.
        self._not_finite = set(_not_finite(before.items()))

    @property
    def loaded(self) -> dict[str, Tensor]:
        """The tensors that were loaded, by their keys in state dicts."""
        return {
            name: tensor
            for name, tensor in _loadable(self.model).items()
            if tensor is not self._before[name][0] or tensor._version != self._before[name][1]
        }

    @property
    def left(self) -> list[str]:
        """The keys whose tensors did not change."""
        loaded = self.loaded
        return [name for name in self._before if name not in loaded]

    @property
    def broken(self) -> list[str]:
        """The keys whose tensors became NaN or infinite."""
        return [name for name in _not_finite(self.loaded.items()) if name not in self._not_finite]


def refuse_enc_in_plain(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` if layers are ENC in a checkpoint and plain in ``model``, where W would be the weight."""
    own = {key.removeprefix("module.") for key in model.state_dict()}
    prefixes = {name: f"{name}." if name else "" for name in saved_settings(state_dict)}
    plain = [
        name
        for name, prefix in prefixes.items()
        if prefix + KEY not in own and any(prefix + key in own for key in WEIGHT_KEYS)
    ]
    if plain:
        raise ValueError(
            f"checkpoint: {len(plain)} of its layers are ENC but plain in this model ({plain[0]!r}, ...), so the "
            "outputs would differ; use the config that it was trained with (a copy is in its work_dir), or fold it "
            "first with that config: python tools/fold.py CONFIG CHECKPOINT OUT"
        )


def check_trained_as(model: nn.Module) -> None:
    """Raise ``ValueError`` if a layer of ``model`` has loaded weights that were saved with other ENC settings.

    Training may start from such weights (with a warning), but measuring the network would be wrong.
    """
    for name, layer in model.named_modules():
        saved = layer.loaded_settings if isinstance(layer, ENCLayer) else None
        if saved == {}:
            raise ValueError(
                f"checkpoint: its layer {name!r} is plain, but the layer of this model is ENC and gives other outputs; "
                "use the plain config, or keep the outputs of the plain weights with enc=dict(preserve=True)"
            )
        if saved and differing_settings(saved, layer.enc_settings):
            raise ValueError(
                f"checkpoint: its layer {name!r} was trained with {settings_text(saved)}, the config's has "
                f"{settings_text(layer.enc_settings)}; use the config of the training run (a copy is in its work_dir)"
            )


def load_trained(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of a trained network strictly, to measure or fold it.

    Args:
        model: The network to load into.
        state_dict: State dict of the same network.

    Raises:
        ValueError: If keys or shapes differ, if a layer is ENC in only one of ``model`` and ``state_dict`` or has other
            settings, or if NaN or Inf is loaded.
    """
    refuse_enc_in_plain(model, state_dict)
    loading = Loading(model)
    try:
        # Strictly, because untrained tensors would be measured as if they had been trained.
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"checkpoint: it does not fit the config: {text[:400]}") from error
    broken = loading.broken
    if broken:
        raise ValueError(f"checkpoint: it holds NaN or Inf in {len(broken)} tensors: {broken[0]!r}, ...")
    check_trained_as(model)


def _loadable(model: nn.Module) -> dict[str, Tensor]:
    # A batch norm loads its own num_batches_tracked if an old checkpoint has none, so a write says nothing there.
    passed_over = (KEY, "num_batches_tracked")
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and not key.endswith(passed_over)}


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            yield name
