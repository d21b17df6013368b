"""Importing this module raises ``ImportError`` that names the extra where mmengine is missing, or cannot work."""

from .environment import require

require("mmengine")
