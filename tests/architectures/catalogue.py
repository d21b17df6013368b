"""The architectures that ENC is tried on: one line each, in their smallest or a shortened form, without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torchvision
from mmengine.hub import get_config
from mmpretrain.registry import MODELS
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """How to build one network and what it takes.

    Attributes:
        library: ``'torchvision'``, ``'timm'`` or ``'mmpretrain'``.
        name: The library's own name, of a factory or (with a remark behind it) a class; of mmpretrain, the config.
        size: Side of the square pictures.
        options: Passed to the library's factory; of mmpretrain, merged into the config's ``model``.
        enc: Options of ``to_enc``.
        redraw: Layers that start at zero, which ``to_enc`` refuses: they get random weights first.
        frames: Length of the clips of a network for videos, or None.
    """

    library: str
    name: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    enc: dict[str, Any] = field(default_factory=dict)
    redraw: tuple[str, ...] = ()
    frames: int | None = None

    @property
    def id(self) -> str:
        """Library and name, for reports of tests."""
        return f"{self.library}-{self.name.rpartition('/')[2].removesuffix('.py')}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        spatial = (self.size, self.size)
        return (3, *spatial) if self.frames is None else (3, self.frames, *spatial)

    def build(self) -> nn.Module:
        """The stock network with fresh weights, drawn from torch's global generator."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about their own factories
            return _BUILDERS[self.library](self.name, self.options)


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    if name[0].isupper():  # a class, where the named networks are large
        return getattr(torchvision.models, name.partition(" ")[0])(num_classes=CLASSES, **options)
    return torchvision.models.get_model(name, num_classes=CLASSES, **options)


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


def _mmpretrain(name: str, options: dict[str, Any]) -> nn.Module:
    whole = get_config(f"mmpretrain::{name}")
    for key, value in {_classes_key(whole.model): CLASSES, **options}.items():
        whole.merge_from_dict({f"model.{key}": value})
    cfg = whole.model
    if "topk" in cfg.head:
        cfg.head.topk = (1,)
    cfg.pop("train_cfg", None)  # mixes pictures within the preprocessor, which is not run here
    cfg.backbone.pop("init_cfg", None)
    return MODELS.build(cfg)


def _classes_key(model: dict[str, Any]) -> str:
    """Who owns the classifier: the head, or the backbone of networks whose auxiliary classifier is within."""
    return "head.num_classes" if "num_classes" in model["head"] else "backbone.num_classes"


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "mmpretrain": _mmpretrain,
}


def tv(name: str, size: int = 64, *, enc=None, redraw=(), frames=None, **options: Any) -> Architecture:
    return Architecture("torchvision", name, size, options, enc or {}, redraw, frames)


def ti(name: str, size: int = 64, *, enc=None, redraw=(), **options: Any) -> Architecture:
    return Architecture("timm", name, size, options, enc or {}, redraw)


def mm(name: str, size: int = 64, *, enc=None, **options: Any) -> Architecture:
    options = {key.replace("__", "."): value for key, value in options.items()}
    return Architecture("mmpretrain", f"{name}.py", size, options, enc or {})


TIMM_VIT = dict(img_size=64, depth=2, embed_dim=48, num_heads=3)
MMPRETRAIN_BEIT = dict(
    backbone__img_size=64,
    backbone__arch=dict(_delete_=True, embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96),
    head__in_channels=48,
)
MMPRETRAIN_MIXER = dict(
    backbone__img_size=64,
    backbone__arch=dict(_delete_=True, embed_dims=48, num_layers=2, tokens_mlp_dims=24, channels_mlp_dims=96),
    head__in_channels=48,
)
MMPRETRAIN_SWIN = dict(_delete_=True, embed_dims=48, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
SMALL_MAPS = dict(backbone__pad_small_map=True, head__in_channels=384)
POOLED_VGG = dict(  # without the 120 M parameters of the three linear layers
    backbone__num_classes=-1,
    neck=dict(_delete_=True, type="GlobalAveragePooling"),
    head=dict(_delete_=True, type="LinearClsHead", num_classes=CLASSES, in_channels=512),
)
ONE_TAP = dict(exclude="*_scale.conv")  # depthwise 1x1 kernels: rows of one element
TWO_INPUTS = dict(exclude="*.cpb_mlp.0")  # a linear layer on coordinates: rows of two elements
TORCHVISION_VIT = dict(num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96)
TORCHVISION_SWIN = dict(patch_size=[4, 4], embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4])
SECOND_SWIN = dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
TORCHVISION_MAXVIT = dict(
    input_size=(64, 64),
    partition_size=4,
    stem_channels=16,
    block_channels=[16, 32],
    block_layers=[1, 1],
    head_dim=8,
    stochastic_depth_prob=0.0,
)

ARCHITECTURES = [
    tv("resnet18"),
    tv("resnext50_32x4d", 32),
    tv("densenet121", 32),
    tv("mobilenet_v2"),
    tv("mobilenet_v3_small"),
    tv("efficientnet_b0"),
    tv("regnet_x_400mf"),
    tv("regnet_y_400mf"),
    tv("shufflenet_v2_x0_5"),
    tv("squeezenet1_1"),
    tv("googlenet", init_weights=False),
    tv("inception_v3", 96, init_weights=False, aux_logits=False),
    tv("mnasnet0_5"),
    tv("ConvNeXt", block_setting=[CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 2)]),
    tv("VisionTransformer", redraw=("heads.head",), image_size=64, patch_size=16, **TORCHVISION_VIT),
    tv("SwinTransformer", **TORCHVISION_SWIN),
    tv("SwinTransformer v2", enc=TWO_INPUTS, **TORCHVISION_SWIN, **SECOND_SWIN),
    tv("MaxVit", **TORCHVISION_MAXVIT),
    tv("r2plus1d_18", 32, frames=4),
    tv("mc3_18", 32, frames=4),
    #
    ti("resnet10t"),
    ti("legacy_seresnet18"),
    ti("skresnet18"),
    ti("resnest14d"),
    ti("res2net50_14w_8s", layers=(1, 1, 1, 1)),
    ti("resnetv2_18"),
    ti("resnetv2_50x1_bit", 32),
    ti("test_nfnet"),
    ti("densenetblur121d", block_config=(2, 2, 2, 2)),
    ti("dpn48b"),
    ti("dla46_c"),
    ti("hrnet_w18_small"),
    ti("ese_vovnet19b_dw"),
    ti("mobilenetv2_050"),
    ti("tf_mobilenetv3_small_minimal_100"),
    ti("tf_efficientnet_lite0"),
    ti("mixnet_s"),
    ti("mobilenetv4_conv_small_050"),
    ti("ghostnet_050"),
    ti("repvgg_a0"),
    ti("mobileone_s0", 32, enc=ONE_TAP),
    ti("repvit_m0_9", enc=dict(exclude="*.token_mixer.conv1")),
    ti("fastvit_t8", enc=ONE_TAP),
    ti("convnext_atto"),
    ti("test_vit"),
    ti("deit_tiny_distilled_patch16_224", **TIMM_VIT),
    ti("beit_base_patch16_224", **TIMM_VIT),
    ti("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    ti("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), embed_dim=24, num_heads=(1, 2)),
    ti("gmlp_ti16_224", img_size=64, redraw=("head",)),
    ti("levit_128s", 224),
    ti("test_maxvit", 160),
    ti("test_coatnet", 160),
    ti("tnt_s_legacy_patch16_224", img_size=64, depth=2),
    ti("twins_svt_small", depths=(1, 1, 1, 1)),
    ti("pvt_v2_b0", depths=(1, 1, 1, 1)),
    ti("mobilevit_xxs"),
    ti("edgenext_xx_small"),
    ti("lambda_resnet26t", 128),
    ti("cait_xxs24_224", img_size=64, depth=2),
    ti("test_mambaout"),
    ti("efficientvit_m0"),
    ti("starnet_s050"),
    #
    mm("resnet/resnet18_8xb16_cifar10", 32),
    mm("seresnet/seresnet50_8xb32_in1k", 32),
    mm("resnext/resnext50-32x4d_8xb32_in1k", 32),
    mm("res2net/res2net50-w14-s8_8xb32_in1k", 32),
    mm("densenet/densenet121_4xb256_in1k", 32),
    mm("vgg/vgg11_8xb32_in1k", 32, **POOLED_VGG),
    mm("vgg/vgg11bn_8xb32_in1k", 32, **POOLED_VGG),
    mm("mobilenet_v2/mobilenet-v2_8xb32_in1k"),
    mm("mobilenet_v3/mobilenet-v3-small-050_8xb128_in1k"),
    mm("efficientnet/efficientnet-b0_8xb32_in1k"),
    mm("regnet/regnetx-400mf_8xb128_in1k"),
    mm("repvgg/repvgg-A0_8xb32_in1k"),
    mm("mobileone/mobileone-s0_8xb32_in1k", enc=dict(exclude="*.branch_scale.conv")),
    mm("convnext_v2/convnext-v2-atto_32xb32_in1k"),
    mm("deit/deit-tiny-distilled_4xb256_in1k", backbone__img_size=64),
    mm("beit/benchmarks/beit-base-p16_8xb128-coslr-100e_in1k", **MMPRETRAIN_BEIT),
    mm("swin_transformer/swin-tiny_16xb64_in1k", backbone__img_size=64, backbone__arch=MMPRETRAIN_SWIN, **SMALL_MAPS),
    mm("mlp_mixer/mlp-mixer-base-p16_64xb64_in1k", **MMPRETRAIN_MIXER),
    mm("poolformer/poolformer-s12_32xb128_in1k"),
    mm("levit/levit-128s_8xb256_in1k", 224, head__distillation=False),
    mm("efficientformer/efficientformer-l1_8xb128_in1k", 224, head__distillation=False),
    mm("cspnet/cspresnet50_8xb32_in1k"),
    mm("hrnet/hrnet-w18_4xb32_in1k"),
    mm("inception_v3/inception-v3_8xb32_in1k", 96),
    mm("shufflenet_v1/shufflenet-v1-1x_16xb64_in1k"),
    mm("mobilevit/mobilevit-xxsmall_8xb128_in1k"),
    mm("van/van-tiny_8xb128_in1k"),
    mm("revvit/revvit-small_8xb256_in1k", backbone__img_size=64),
    mm("hornet/hornet-tiny_8xb128_in1k"),
    mm("conformer/conformer-tiny-p16_8xb128_in1k"),
    mm("tinyvit/tinyvit-5m_8xb256_in1k", 224),
]

# One of each library for the default suite: two seconds together.
SMOKE = {"torchvision-SwinTransformer", "timm-test_vit", "mmpretrain-beit-base-p16_8xb128-coslr-100e_in1k"}
