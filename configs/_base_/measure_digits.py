# GBR and accuracy under FGSM, after each epoch. Steps below 8/255 have little effect, because digits have a high contrast.
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=None),
    dict(type="FGSMHook", eps=(4, 8, 16, 32)),
]
