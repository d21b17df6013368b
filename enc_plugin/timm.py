"""ENC models in timm's registry (``enc_resnet50``, ...), and parameter groups for your own training loop.

Importing this module registers the models; ``import enc_plugin`` alone does not. It needs timm:
``pip install 'enc-plugin[timm]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from timm.models import model_entrypoint, register_model
except ModuleNotFoundError as error:
    if error.name != "timm":  # timm is installed, but a module that it needs is not
        raise
    raise ModuleNotFoundError(
        "enc_plugin.timm needs timm, which is not installed; run: pip install 'enc-plugin[timm]'", name=error.name
    ) from error
from torch import nn

from .convert import to_enc
from .functional.checks import check_type
from .optim import add_shift, describe_groups, param_groups_enc

__all__ = ["ARCHITECTURES", "add_shift", "describe_groups", "param_groups_enc"]

# timm models with an ENC version: those of the paper's Table 4, and smaller ones of the same families.
ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "seresnet50",
    "seresnet101",
    "densenet121",
    "densenet201",
)


def _register(architecture: str) -> Callable[..., nn.Module]:
    """Register ``enc_<architecture>`` with timm."""

    def create(pretrained: bool = False, enc: dict | None = None, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"pretrained: there are no weights of enc_{architecture}, and those of {architecture} were trained "
                "without the constraint; to start from them anyway, create the plain model and pass it to "
                "enc_plugin.to_enc"
            )
        check_type("enc", enc, (dict, type(None)), "a dict of options of to_enc, or None")
        model = model_entrypoint(architecture)(pretrained=False, **kwargs)
        to_enc(model, **(enc or {}))
        return model

    create.__name__ = create.__qualname__ = f"enc_{architecture}"
    create.__doc__ = f"""timm's {architecture} as an ENC network: the weight of every layer has squared norm alpha.

    Args:
        pretrained: Must be False, because there are no pretrained weights.
        enc: Options of :func:`enc_plugin.to_enc`, such as ``dict(variant='wn')``.
        **kwargs: As for the plain model, ``num_classes``, ``in_chans``, ...
    """
    return register_model(create)


for _architecture in ARCHITECTURES:
    globals()[f"enc_{_architecture}"] = _register(_architecture)
