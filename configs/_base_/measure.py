# What the paper measures, each epoch: GBR of 512 fixed training samples (exact: ten classes are ten backward passes), and
# the accuracy of up to 2,000 validation images under FGSM. Neither leaves a trace in the run.
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=None),
    dict(type="FGSMHook", eps=(1, 2, 4, 8), num_samples=2000),
]
