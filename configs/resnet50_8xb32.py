# The paper's baseline, with mmpretrain's defaults: Kaiming initialisation, and all batch norm weights start at 1.
_base_ = ["mmpretrain::_base_/models/resnet50.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(zero_init_residual=False))
