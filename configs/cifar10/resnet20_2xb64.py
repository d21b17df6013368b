_base_ = ["mmpretrain::_base_/default_runtime.py", "../_base_/enc.py", "../_base_/cifar10.py", "../_base_/resnet20.py"]
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
randomness = dict(seed=0)
