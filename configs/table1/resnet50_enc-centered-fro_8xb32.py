_base_ = "../resnet50_enc_8xb32.py"
model = dict(enc=dict(variant="centered_fro"))
