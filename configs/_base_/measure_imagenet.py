# After each epoch: GBR of 512 training images (unbiased, with one random projection each), and accuracy of 2,000
# validation images under FGSM. To add this to a config, write a config with the line
# _base_ = ["./resnet50_enc_8xb32.py", "./_base_/measure_imagenet.py"]
custom_hooks = [dict(type="GBRHook"), dict(type="FGSMHook", eps=(1, 2, 4, 8), num_samples=2000)]
