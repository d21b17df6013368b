"""Weights & Biases with the axes that every other backend has."""

from __future__ import annotations

from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend
from mmengine.visualization.vis_backend import force_init_env


@VISBACKENDS.register_module()
class ENCWandbVisBackend(WandbVisBackend):
    """mmengine's ``WandbVisBackend``, which drops the step of what it is given: charts count calls then.

    Here each row holds its ``step``, and that is the axis of every chart: epochs for what is logged once an epoch
    (validation, GBR, FGSM, the audit), iterations for what training logs; the same as in TensorBoard, MLflow and
    ``scalars.json``.

    Args:
        *args, **kwargs: As for mmengine's ``WandbVisBackend``.
    """

    def _init_env(self) -> None:
        super()._init_env()
        self._wandb.define_metric("*", step_metric="step")

    @force_init_env
    def add_scalar(self, name: str, value, step: int = 0, **kwargs) -> None:
        """Record a scalar and its step."""
        self.add_scalars({name: value}, step)

    @force_init_env
    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs) -> None:
        """Record scalars and their step."""
        self._wandb.log({**scalar_dict, "step": step}, commit=self._commit)
