_base_ = ["./resnet20_2xb64.py", "../_base_/measure.py"]
