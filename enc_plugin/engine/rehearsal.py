"""Runs a config up to its first training step, for the doctor."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..build import stack_pictures


class _FirstStep(Exception):
    """Ends a rehearsal before its first step."""


class _StopBeforeTraining(Hook):
    priority = 65  # after hooks that check, before hooks that measure the initial weights

    def before_train(self, runner: Runner) -> None:
        raise _FirstStep


def rehearse(cfg: Config) -> None:
    """Run ``cfg`` up to its first step, in a temporary work dir, in one process and without visualizers.

    Raises:
        Exception: The error with which the run would end.
    """
    cfg = copy.deepcopy(cfg)
    hooks = cfg.get("default_hooks") or {}
    (hooks.get("checkpoint") or {}).pop("out_dir", None)
    own = [] if cfg.get("runner_type") == "ENCRunner" else [{"type": "ENCGuardHook"}]
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), *own]
    cfg.launcher, cfg.resume, cfg.visualizer = "none", False, None
    cfg.experiment_name = f"rehearsal_{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        stack_pictures(cfg)
        runner = RUNNERS.build(cfg)
        runner.register_hook(_StopBeforeTraining(), _StopBeforeTraining.priority)
        with contextlib.suppress(_FirstStep):
            runner.train()
