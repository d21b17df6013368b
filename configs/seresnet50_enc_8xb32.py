_base_ = "./seresnet50_8xb32.py"
model = dict(type="ENCImageClassifier")
