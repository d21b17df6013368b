_base_ = ["mmpretrain::_base_/models/resnext101_32x4d.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(zero_init_residual=False))
