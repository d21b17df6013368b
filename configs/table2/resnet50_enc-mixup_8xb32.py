_base_ = "./resnet50_mixup_8xb32.py"
model = dict(type="ENCImageClassifier")
