_base_ = "../resnet50_8xb32.py"
model = dict(backbone=dict(type="DropBlockResNet", drop_prob=0.1, block_size=7, drop_stages=(3, 4)))
custom_hooks = [dict(type="DropBlockScheduleHook")]
