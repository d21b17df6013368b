_base_ = "../figure1/resnet50_wd1e-4_8xb32.py"
