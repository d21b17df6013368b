# The paper's baseline: the stock recipe, biases without decay.
_base_ = ["mmpretrain::resnet/resnet50_8xb32_in1k.py", "./_base_/enc.py"]
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
