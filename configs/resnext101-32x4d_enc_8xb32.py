_base_ = "./resnext101-32x4d_8xb32.py"
model = dict(type="ENCImageClassifier")
