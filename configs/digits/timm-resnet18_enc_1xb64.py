_base_ = ["mmpretrain::_base_/default_runtime.py", "../_base_/enc.py", "../_base_/digits.py"]
custom_imports = dict(imports=["enc_plugin", "enc_plugin.timm"])
model = dict(type="TimmClassifier", model_name="enc_resnet18", num_classes=10, channels=(16, 32, 64, 128))
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
randomness = dict(seed=0)
