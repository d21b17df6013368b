# ResNet-18 with the stem for small pictures, 41 times the parameters of ResNet-20, by the same recipe.
_base_ = "./cifar10_resnet20.py"
model = dict(
    backbone=dict(
        _delete_=True, type="ResNet_CIFAR", depth=18, num_stages=4, out_indices=(3,), zero_init_residual=False
    ),
    head=dict(in_channels=512),
)
