_base_ = "./resnet50_cutout_8xb32.py"
model = dict(type="ENCImageClassifier")
