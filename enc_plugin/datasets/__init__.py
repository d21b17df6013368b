"""Datasets, registered on mmengine's root registry."""

from ..installation import needs_mmpretrain  # noqa: F401

# isort: split
from .cifar10 import CIFAR10Folder
from .digits import Digits
from .folder import ImageFolder

__all__ = ["CIFAR10Folder", "Digits", "ImageFolder"]
