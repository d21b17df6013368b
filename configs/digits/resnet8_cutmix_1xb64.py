_base_ = "./resnet8_1xb64.py"
model = dict(train_cfg=dict(augments=dict(type="CutMix", alpha=1.0)))
