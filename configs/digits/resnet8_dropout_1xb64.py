_base_ = "./resnet8_1xb64.py"
model = dict(head=dict(type="DropoutLinearClsHead", dropout=0.2))
