_base_ = ["mmpretrain::_base_/models/seresnet101.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(zero_init_residual=False))
