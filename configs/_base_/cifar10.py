# CIFAR-10 as image files in data/cifar10/{train,test}/<class>/, which tools/prepare_cifar10.py creates.
_base_ = "./schedule_20e.py"
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
auto_scale_lr = dict(base_batch_size=128)
