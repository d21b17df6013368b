_base_ = "./resnet8_1xb64.py"
model = dict(head=dict(loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1)))
