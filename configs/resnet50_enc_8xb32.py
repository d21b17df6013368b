_base_ = "./resnet50_8xb32.py"
model = dict(type="ENCImageClassifier")
