# ResNet-20 on CIFAR-10 (JPEG) by the paper's recipe (SGD, lr 0.1, momentum 0.9, decay 1e-4 but for biases) at batch 128,
# measured each epoch; the arenas of the grid set images and epochs. Everything runs in one process without workers, so that
# the seed alone decides the initial weights and the order of the data.
_base_ = "../../configs/cifar10/resnet20_2xb64.py"
train_dataloader = dict(batch_size=128, num_workers=0, persistent_workers=False, pin_memory=False)
val_dataloader = dict(num_workers=0, persistent_workers=False, pin_memory=False)
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1), logger=dict(interval=50))
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=1, output="logits"),
    dict(type="GBRHook", num_samples=512, projections=1, output="probs"),
    dict(type="FGSMHook", eps=(1, 2, 4, 8), num_samples=2000, interval=1000),  # after the last epoch alone
]
