# timm's ResNet-50, trained by mmpretrain.
_base_ = ["./_base_/imagenet.py"]
custom_imports = dict(imports=["enc_plugin", "enc_plugin.timm"])
model = dict(type="TimmClassifier", model_name="enc_resnet50", num_classes=1000, zero_init_last=False)
