# The paper's recipe: 100 epochs of SGD, lr 0.1 divided by 10 at epochs 30, 60 and 90, decay 1e-4 except for biases,
# 8 GPUs x 32 images, random-size crop and flip. This is mmpretrain's default schedule; its SE-ResNet and DenseNet configs
# train for 140 and 90 epochs instead. For GBR and FGSM after each epoch, add ./measure_imagenet.py.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "mmpretrain::_base_/default_runtime.py",
    "./enc.py",
]
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
