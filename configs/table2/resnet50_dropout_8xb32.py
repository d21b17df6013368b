_base_ = "../resnet50_8xb32.py"
model = dict(head=dict(type="DropoutLinearClsHead", dropout=0.2))
