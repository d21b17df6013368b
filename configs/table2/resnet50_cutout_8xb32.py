_base_ = "../resnet50_8xb32.py"
# A square with half the side of the crop, filled with the mean pixel (BGR), which is zero after normalisation.
cutout = dict(type="Cutout", shape=112, pad_val=(104, 116, 124), prob=1.0)
train_pipeline = [*_base_.train_pipeline[:-1], cutout, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
