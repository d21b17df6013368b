_base_ = "./resnet50_cutmix_8xb32.py"
model = dict(type="ENCImageClassifier")
