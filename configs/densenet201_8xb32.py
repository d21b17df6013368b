# Kaiming initialisation as in torchvision; mmpretrain uses torch's default initialisation for DenseNet.
_base_ = ["mmpretrain::_base_/models/densenet/densenet201.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(init_cfg=dict(type="Kaiming", layer="Conv2d", mode="fan_in")))
