_base_ = ["../resnet50_8xb32.py", "../_base_/gbr.py"]
optim_wrapper = dict(optimizer=dict(weight_decay=1e-3))
