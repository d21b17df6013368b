# GBR and accuracy under FGSM each epoch; the digits' contrast is so high that steps below 8/255 hardly matter.
custom_hooks = [
    dict(type="GBRHook", num_samples=512, projections=None),
    dict(type="FGSMHook", eps=(4, 8, 16, 32)),
]
