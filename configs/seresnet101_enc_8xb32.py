_base_ = "./seresnet101_8xb32.py"
model = dict(type="ENCImageClassifier")
optim_wrapper = dict(paramwise_cfg=dict(shift_eps=1e-6))
