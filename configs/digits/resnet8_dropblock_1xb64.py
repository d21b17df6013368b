_base_ = "./resnet8_1xb64.py"
model = dict(backbone=dict(type="DropBlockResNetCIFAR6n", drop_prob=0.1, block_size=3, drop_stages=(2, 3)))
custom_hooks = [dict(type="DropBlockScheduleHook")]
