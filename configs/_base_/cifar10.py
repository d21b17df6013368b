# CIFAR-10 as a folder of pictures, data/cifar10/{train,test}/<class>/ (tools/prepare_cifar10.py makes it).
dataset_type = "CIFAR10Folder"
data_preprocessor = dict(num_classes=10, mean=[125.27, 122.93, 113.86], std=[62.53, 61.91, 66.46], to_rgb=True)

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        type=dataset_type,
        data_root="data/cifar10",
        split="train",
        pipeline=[
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=1,
    dataset=dict(type=dataset_type, data_root="data/cifar10", split="test", pipeline=[dict(type="PackInputs")]),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

# The paper's recipe (lr 0.1, momentum 0.9, decay 1e-4, divided by 10 at 30, 60 and 90 %) in 20 epochs, batch 128.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[6, 12, 18], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128)
