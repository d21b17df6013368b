"""What a config asks of training, and whether runs side by side can do it."""

from __future__ import annotations

from dataclasses import dataclass

from mmengine.config import Config

_KNOWN = {
    "RandomCrop": {"crop_size", "padding"},
    "RandomFlip": {"prob", "direction"},
    "Cutout": {"shape", "pad_val", "prob"},
    "PackInputs": set(),
}
_MIXED = {"Mixup": {"alpha"}, "CutMix": {"alpha"}, "GaussianNoise": {"std"}}


@dataclass(frozen=True)
class Recipe:
    """How a config augments its training pictures.

    Attributes:
        size: Side of a picture, in pixels.
        padding: Black pixels around it before the crop.
        flip: Probability of a horizontal flip; None: no flip.
        cut: Side of the square that is cut out; None: none.
        fill: Pixel that fills the square.
        mixing: ``'Mixup'``, ``'CutMix'`` or ``'GaussianNoise'``, and its strength; None: none.
    """

    size: int
    padding: int
    flip: float | None = None
    cut: int | None = None
    fill: tuple[float, ...] = ()
    mixing: tuple[str, float] | None = None

    @classmethod
    def of(cls, cfg: Config) -> Recipe:
        """That of a config.

        Raises:
            ValueError: If it augments in a way that is not known here; names the transform.
        """
        steps = {}
        for step in cfg.train_dataloader.dataset.pipeline:
            kind = step["type"]
            if kind not in _KNOWN or set(step) - {"type"} != _KNOWN[kind]:
                raise ValueError(f"pipeline: expected {', '.join(_KNOWN)} with the study's options, got {dict(step)}")
            steps[kind] = step
        if list(steps) != [kind for kind in _KNOWN if kind in steps] or "RandomCrop" not in steps:
            raise ValueError(f"pipeline: expected RandomCrop first, then {', '.join(_KNOWN)} in this order")
        flip, cut = steps.get("RandomFlip"), steps.get("Cutout")
        if (flip and flip["direction"] != "horizontal") or (cut and cut["prob"] != 1.0):
            raise ValueError(f"pipeline: expected horizontal flips and Cutout of every picture, got {flip}, {cut}")
        mixing = (cfg.model.get("train_cfg") or {}).get("augments")
        if mixing is not None and set(mixing) - {"type"} != _MIXED.get(mixing["type"]):
            raise ValueError(f"augments: expected one of {', '.join(_MIXED)} with its strength, got {dict(mixing)}")
        return cls(
            size=steps["RandomCrop"]["crop_size"],
            padding=steps["RandomCrop"]["padding"],
            flip=flip and flip["prob"],
            cut=cut and cut["shape"],
            fill=tuple(cut["pad_val"]) if cut else (),
            mixing=mixing and (mixing["type"], *(value for key, value in mixing.items() if key != "type")),
        )


def validated_epochs(cfg: Config) -> list[int]:
    """The epochs, counted from 1, after which the runner validates."""
    last, every = cfg.train_cfg.max_epochs, cfg.train_cfg.get("val_interval", 1)
    return [epoch for epoch in range(1, last + 1) if epoch % every == 0 or epoch == last]


def check_known(cfg: Config) -> None:
    """Raise ``ValueError`` if a config has parts that would be left out here."""
    hooks = {hook["type"] for hook in cfg.custom_hooks} | set(cfg.default_hooks)
    known = {"GBRHook", "FGSMHook", "timer", "logger", "param_scheduler", "checkpoint", "sampler_seed", "visualization"}
    if unknown := hooks - known:
        raise ValueError(f"hooks: runs side by side know {', '.join(sorted(known))}, not {', '.join(sorted(unknown))}")
    schedule, wrapper = cfg.param_scheduler, cfg.optim_wrapper
    if schedule.type != "MultiStepLR" or not schedule.by_epoch:
        raise ValueError(f"param_scheduler: expected MultiStepLR by epochs, got {dict(schedule)}")
    if unknown := set(wrapper) - {"type", "constructor", "optimizer", "paramwise_cfg"}:
        raise ValueError(f"optim_wrapper: runs side by side do not know {', '.join(sorted(unknown))}")
