_base_ = "../figure1/resnet50_wd1e-3_8xb32.py"
