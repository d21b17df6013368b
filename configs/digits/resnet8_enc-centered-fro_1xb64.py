_base_ = "./resnet8_enc-ws_1xb64.py"
model = dict(enc=dict(variant="centered_fro"))
