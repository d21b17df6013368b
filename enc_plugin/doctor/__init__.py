"""The doctor: whether the environment works, and whether a config would, before hours of training."""

from .checks import check_config, run
from .finding import BROKEN, NOTE, OK, Finding

__all__ = ["BROKEN", "NOTE", "OK", "Finding", "check_config", "run"]
