"""Trains many runs of the study at once on one device, because a small network alone leaves a GPU idle mostly."""

from enc_plugin.installation import needs_mmpretrain  # noqa: F401

# isort: split
from .turns import prepare_process, train_in_processes, train_in_turns

__all__ = ["prepare_process", "train_in_processes", "train_in_turns"]
