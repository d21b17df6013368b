# After each epoch: exact GBR of 512 fixed training samples (one backward pass per class), and accuracy of up to 2,000
# validation images under FGSM. Neither changes the training.
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=None),
    dict(type="FGSMHook", eps=(1, 2, 4, 8), num_samples=2000),
]
