_base_ = "./resnet50_enc-mixup_8xb32.py"
model = dict(head=dict(loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1)))
