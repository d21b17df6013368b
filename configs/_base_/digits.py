# scikit-learn's handwritten digits (8x8 pixels, no download) and a schedule that takes seconds.
_base_ = "./schedule_20e.py"
dataset_type = "Digits"
data_preprocessor = dict(num_classes=10, mean=[77.9] * 3, std=[95.9] * 3, to_rgb=False)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        type=dataset_type,
        split="train",
        pipeline=[
            dict(type="RandomCrop", crop_size=8, padding=1),
            dict(type="PackInputs"),
        ],
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(type=dataset_type, split="test", pipeline=[dict(type="PackInputs")]),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=64)
