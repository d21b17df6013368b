# The paper's baseline: Kaiming initialisation, no batch norm starts at zero (mmpretrain's default).
_base_ = ["mmpretrain::_base_/models/resnet50.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(zero_init_residual=False))
