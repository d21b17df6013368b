_base_ = ["mmpretrain::_base_/default_runtime.py", "../_base_/enc.py", "../_base_/digits.py", "../_base_/resnet20.py"]
model = dict(backbone=dict(depth=8))
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
randomness = dict(seed=0)
