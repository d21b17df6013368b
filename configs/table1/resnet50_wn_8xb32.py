# Weight normalization with a learnable gain in every convolution, without the norm constraint.
_base_ = "../resnet50_8xb32.py"
model = dict(backbone=dict(conv_cfg=dict(type="WNConv2d")))
