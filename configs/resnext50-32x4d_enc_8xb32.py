_base_ = "./resnext50-32x4d_8xb32.py"
model = dict(type="ENCImageClassifier")
