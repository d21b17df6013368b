"""Weights & Biases backend that logs steps."""

from __future__ import annotations

from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend
from mmengine.visualization.vis_backend import force_init_env


@VISBACKENDS.register_module()
class ENCWandbVisBackend(WandbVisBackend):
    """mmengine's ``WandbVisBackend`` with the step of each scalar, which mmengine's drops.

    The step is the x axis of every chart, as in TensorBoard, MLflow and ``scalars.json``: epochs for scalars that are
    logged once per epoch (validation, GBR, FGSM, the audit), iterations for those of training.
    """

    def _init_env(self) -> None:
        super()._init_env()
        self._wandb.define_metric("*", step_metric="step")

    @force_init_env
    def add_scalar(self, name: str, value, step: int = 0, **kwargs) -> None:
        """Log a scalar and its step."""
        self.add_scalars({name: value}, step)

    @force_init_env
    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs) -> None:
        """Log scalars and their step."""
        self._wandb.log({**scalar_dict, "step": step}, commit=self._commit)
