# The paper's recipe: 100 epochs of SGD, lr 0.1 divided by 10 at 30, 60 and 90, decay 1e-4 but for biases, 8 GPUs x 32,
# random-size crop and flip. GBR and FGSM each epoch: add ./measure_imagenet.py, which says how.
# mmpretrain's schedule says the same; its own files for SE (140) and DenseNet (90 epochs) do not.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/schedules/imagenet_bs256.py",
    "mmpretrain::_base_/default_runtime.py",
    "./enc.py",
]
optim_wrapper = dict(constructor="ENCOptimWrapperConstructor")
