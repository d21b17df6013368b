# mmpretrain leaves DenseNet to torch's default initialisation; Kaiming as in torchvision.
_base_ = ["mmpretrain::_base_/models/densenet/densenet201.py", "./_base_/imagenet.py"]
model = dict(backbone=dict(init_cfg=dict(type="Kaiming", layer="Conv2d", mode="fan_in")))
