_base_ = "./resnet50_ls_8xb32.py"
model = dict(type="ENCImageClassifier")
