# Eq. 18 after every epoch, on the same training images through the whole run: logits with respect to the normalised image.
custom_hooks = [dict(type="GBRHook", num_samples=1024, projections=8, output="logits", space="normalized")]
