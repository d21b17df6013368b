_base_ = "./resnet8_enc-ws_1xb64.py"
custom_hooks = [dict(type="GBRHook", num_samples=64, projections=None, output="logits", space="normalized")]
