model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNetCIFAR6n", depth=20, zero_init_residual=False),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=64, loss=dict(type="CrossEntropyLoss")),
)
