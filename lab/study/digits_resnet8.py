# ResNet-8 on scikit-learn's digits: seconds a run, and as few images as a method can be told apart on.
_base_ = "../../configs/digits/resnet8_1xb64.py"
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1), logger=dict(interval=10))
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=1, output="logits"),
    dict(type="GBRHook", num_samples=512, projections=1, output="probs"),
    dict(type="FGSMHook", eps=(4, 8, 16, 32), interval=1000),  # after the last epoch alone
]
