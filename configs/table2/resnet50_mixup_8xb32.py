_base_ = "../resnet50_8xb32.py"
model = dict(train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)))
