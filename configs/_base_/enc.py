# What every ENC run shares. The model and optim_wrapper lines stand in the leaf config: two bases may not set one key.
custom_imports = dict(imports=["enc_plugin"], allow_failed_imports=False)
runner_type = "ENCRunner"
