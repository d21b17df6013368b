"""Checks that a loaded checkpoint fits the network of the run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..surgery.loading import Loading, check_trained_as


def check_loaded(filename: str, state_dict: Mapping[str, Tensor], loading: Loading, to_measure: bool) -> None:
    """Raise ``ValueError`` unless enough of a checkpoint fitted the model.

    For training, at least half of the tensors with names of the model must have been loaded (a classifier for other
    classes may be missing). For validation and testing, all tensors of the model must have been loaded, and the ENC
    settings must be those of the checkpoint.

    Args:
        filename: The checkpoint, for the error.
        state_dict: Its content.
        loading: Record of which tensors of the model were loaded.
        to_measure: Whether the model is validated or tested, not trained.
    """
    saved = {key.removeprefix("module."): value for key, value in state_dict.items()}
    loaded, left, broken = loading.loaded, loading.left, loading.broken
    misfits = [key for key in left if key.removeprefix("module.") in saved]
    if not loaded and not misfits:
        raise ValueError(
            f"load_from: nothing of {filename} fits the model; its keys are {', '.join(map(repr, [*saved][:3]))}, "
            f"..., the model's are {', '.join(map(repr, left[:3]))}, ...; is it from another codebase?"
        )
    if len(misfits) > len(loaded):
        key = misfits[0]
        there, here = (tuple(x.shape) for x in (saved[key.removeprefix("module.")], loading.model.state_dict()[key]))
        raise ValueError(
            f"load_from: only {len(loaded)} of the {len(loaded) + len(misfits)} tensors that {filename} shares with "
            f"the model have the same shape ({key!r}: {there} in the checkpoint, {here} in the model); "
            "is it a checkpoint of another architecture?"
        )
    if broken:
        raise ValueError(f"load_from: {filename} holds NaN or Inf in {len(broken)} tensors: {broken[0]!r}, ...")
    if not to_measure:
        return
    if left:
        raise ValueError(
            f"load_from: {filename} lacks {len(left)} tensors of the model ({left[0]!r}, ...), which would stay "
            "untrained; use the config of the training (a copy is in its work_dir)"
        )
    check_trained_as(loading.model)
