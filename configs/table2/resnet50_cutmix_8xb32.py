_base_ = "../resnet50_8xb32.py"
model = dict(train_cfg=dict(augments=dict(type="CutMix", alpha=1.0)))
