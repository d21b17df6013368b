_base_ = "./resnet20_2xb64.py"
model = dict(type="ENCImageClassifier")
