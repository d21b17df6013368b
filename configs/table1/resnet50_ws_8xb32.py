# Weight standardization (mmcv's ConvWS2d) in every convolution, without the norm constraint.
_base_ = "../resnet50_8xb32.py"
model = dict(backbone=dict(conv_cfg=dict(type="ConvWS")))
