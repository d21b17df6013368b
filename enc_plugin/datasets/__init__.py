"""Datasets, registered on mmengine's root registry."""

from .cifar10 import CIFAR10Folder
from .digits import Digits

__all__ = ["CIFAR10Folder", "Digits"]
