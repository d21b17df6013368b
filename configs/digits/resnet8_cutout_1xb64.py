_base_ = "./resnet8_1xb64.py"
pipeline = _base_.train_dataloader.dataset.pipeline
cutout = dict(type="Cutout", shape=4, pad_val=78, prob=1.0)
train_dataloader = dict(dataset=dict(pipeline=[*pipeline[:-1], cutout, pipeline[-1]]))
