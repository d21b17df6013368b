"""Datasets, registered on mmengine's root registry."""

from .cifar10 import CIFAR10Folder
from .digits import Digits
from .folder import ImageFolder

__all__ = ["CIFAR10Folder", "Digits", "ImageFolder"]
