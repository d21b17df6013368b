# The paper's recipe in 20 epochs: lr 0.1, divided by 10 at 30, 60 and 90 % of the epochs, momentum 0.9, decay 1e-4.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[6, 12, 18], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
