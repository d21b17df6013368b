# GBR of 512 training images (one random projection each, unbiased) and the accuracy of 2,000 validation images under FGSM,
# each epoch. Add it to a config with a file of one line: _base_ = ["./resnet50_enc_8xb32.py", "./_base_/measure_imagenet.py"]
custom_hooks = [dict(type="GBRHook"), dict(type="FGSMHook", eps=(1, 2, 4, 8), num_samples=2000)]
