_base_ = ["./resnet20_enc-ws_2xb64.py", "../_base_/measure.py"]
