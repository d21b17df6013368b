_base_ = "./resnet8_cutmix_1xb64.py"
model = dict(type="ENCImageClassifier", head=dict(loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1)))
