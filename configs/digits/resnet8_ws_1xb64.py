_base_ = "./resnet8_1xb64.py"
model = dict(backbone=dict(conv_cfg=dict(type="ConvWS")))
