_base_ = "./resnet8_1xb64.py"
model = dict(type="ENCImageClassifier")
