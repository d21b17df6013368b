_base_ = "./resnet8_1xb64.py"
model = dict(type="ENCImageClassifier", enc=dict(how="project"))
optim_wrapper = dict(paramwise_cfg=dict(projection="retract"))
