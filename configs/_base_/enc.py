# Settings of all ENC runs. Set model and optim_wrapper in your own config, because two bases may not set the same key.
custom_imports = dict(imports=["enc_plugin"], allow_failed_imports=False)
runner_type = "ENCRunner"
