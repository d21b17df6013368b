"""timm parts: ``enc_*`` models in timm's registry, and parameter groups for a training loop of one's own.

Importing the module registers the models. It needs timm (``pip install 'enc-plugin[timm]'``), which
``import enc_plugin`` alone does not import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from timm.models import model_entrypoint, register_model
except ModuleNotFoundError as error:
    if error.name != "timm":  # timm is there, and lacks something itself
        raise
    raise ModuleNotFoundError(
        "enc_plugin.timm needs timm, which is not installed; run: pip install 'enc-plugin[timm]'", name=error.name
    ) from error
from torch import nn

from .convert import to_enc
from .functional.checks import check_type
from .optim import add_shift, describe_groups, param_groups_enc

__all__ = ["ARCHITECTURES", "add_shift", "describe_groups", "param_groups_enc"]

# timm's names of what has an ENC entry: the paper's Table 4, and smaller networks of the same families.
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
    """Put ``enc_<architecture>`` into timm's registry."""

    def create(pretrained: bool = False, enc: dict | None = None, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"pretrained: there are no weights of enc_{architecture}, and those of {architecture} were trained "
                "without the constraint; to start from them all the same, create the plain model and pass it to "
                "enc_plugin.to_enc"
            )
        check_type("enc", enc, (dict, type(None)), "a dict of options of to_enc, or None")
        model = model_entrypoint(architecture)(pretrained=False, **kwargs)
        to_enc(model, **(enc or {}))
        return model

    create.__name__ = create.__qualname__ = f"enc_{architecture}"
    create.__doc__ = f"""timm's {architecture} as an ENC network: all its layers have squared norm alpha.

    Args:
        pretrained: Has to be False: there are no pretrained weights.
        enc: Options of :func:`enc_plugin.to_enc`, such as ``dict(variant='wn')``.
        **kwargs: As for the plain model, ``num_classes``, ``in_chans``, ...
    """
    return register_model(create)


for _architecture in ARCHITECTURES:
    globals()[f"enc_{_architecture}"] = _register(_architecture)
