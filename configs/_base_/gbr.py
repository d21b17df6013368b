# GBR (eq. 18) after each epoch, on the same training images in the whole run: logits by normalised images.
custom_hooks = [dict(type="GBRHook", num_samples=1024, projections=8, output="logits", space="normalized")]
