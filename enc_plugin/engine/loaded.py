"""Whether a checkpoint that a run has loaded is one of its network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..surgery.loading import Loading, check_trained_as


def check_loaded(filename: str, state_dict: Mapping[str, Tensor], loading: Loading, to_measure: bool) -> None:
    """Raise ``ValueError`` unless enough of a checkpoint fitted the model.

    To train from, half of the tensors that have a place in the model have to fit it (a classifier of other classes may
    be left out); to validate or test, every tensor of the model has to be loaded, by the model's own hooks too, and be
    of layers that compute the same.

    Args:
        filename: The checkpoint, for the error.
        state_dict: What it holds.
        loading: What has become of it in the model.
        to_measure: Whether the model is validated or tested as it is, and not trained.
    """
    saved = {key.removeprefix("module."): value for key, value in state_dict.items()}
    loaded, left, broken = loading.loaded, loading.left, loading.broken
    misfits = [key for key in left if key.removeprefix("module.") in saved]
    if not loaded and not misfits:
        raise ValueError(
            f"load_from: nothing of {filename} fits the model; its keys are {', '.join(map(repr, [*saved][:3]))}, "
            f"..., the model's are {', '.join(map(repr, left[:3]))}, ...; is it a checkpoint of another codebase?"
        )
    if len(misfits) > len(loaded):
        key = misfits[0]
        there, here = (tuple(x.shape) for x in (saved[key.removeprefix("module.")], loading.model.state_dict()[key]))
        raise ValueError(
            f"load_from: only {len(loaded)} of the {len(loaded) + len(misfits)} tensors that {filename} shares "
            f"with the model have its shapes ({key!r}: {there} there, {here} in the model); "
            "is it a checkpoint of another architecture?"
        )
    if broken:
        raise ValueError(f"load_from: {filename} holds NaN or Inf in {len(broken)} tensors: {broken[0]!r}, ...")
    if not to_measure:
        return
    if left:
        raise ValueError(
            f"load_from: {filename} lacks {len(left)} tensors of the model ({left[0]!r}, ...), which would be "
            "measured untrained; use the config that it was trained with (a copy is in its work_dir)"
        )
    check_trained_as(loading.model)
