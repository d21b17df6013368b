"""Convert a trained ENC checkpoint to a checkpoint of the stock config with the same outputs, which are checked."""

import argparse

import _bootstrap

with _bootstrap.one_line("fold"):
    from enc_plugin.build import load_config
    from enc_plugin.deploy import fold_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config (a file, or package::name) that the checkpoint was trained with")
    parser.add_argument("checkpoint", help="ENC checkpoint (.pth, or a state dict as .safetensors)")
    parser.add_argument("out", help="stock checkpoint to write")
    parser.add_argument("--safetensors", action="store_true", help="write safetensors (OUT ends in .safetensors)")
    parser.add_argument(
        "--images", nargs="+", metavar="FILE", help="images for the check (default: the test dataset's)"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="samples for the check (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="accepted relative difference of outputs (default: %(default)s)"
    )
    parser.add_argument(
        "--unsafe-load", action="store_true", help="load pickled objects too, which runs any code in the checkpoint"
    )
    _bootstrap.add_common_options(parser)
    with _bootstrap.one_line("fold", "nothing was written; run it again"):
        args = vars(parser.parse_args())
        config = load_config(args.pop("config"), args.pop("cfg_options"))
        print(fold_checkpoint(config, trust=args.pop("unsafe_load"), **args))
