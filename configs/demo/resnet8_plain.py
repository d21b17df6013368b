_base_ = ["../digits/resnet8_1xb64.py", "../_base_/measure_digits.py"]
