"""Measure the GBR (mean squared norm of the input-output Jacobian) of checkpoints on training samples."""

import argparse

import _bootstrap

with _bootstrap.one_line("measure_gbr"):
    from enc_plugin.reports.gbr_report import measure_checkpoints

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    _bootstrap.add_checkpoints(parser)
    parser.add_argument(
        "--outputs",
        nargs="+",
        default=["logits"],
        choices=["logits", "probs", "label_prob"],
        help="outputs to differentiate (default: logits)",
    )
    parser.add_argument("--num-samples", type=int, default=512, help="training samples (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="samples per batch (default: as for GBRHook)")
    parser.add_argument("--projections", type=int, help="random output directions per sample (default: exact)")
    parser.add_argument(
        "--space",
        default="normalized",
        choices=["normalized", "pixel"],
        help="space of the input x (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples and directions (default: %(default)s)")
    parser.add_argument("--out", help="JSON file to write; with several checkpoints also a PNG beside it")
    parser.add_argument("--plot", help="PNG of the curve to write")
    _bootstrap.add_common_options(parser)
    with _bootstrap.one_line("measure_gbr"):
        args = vars(parser.parse_args())
        pairs = _bootstrap.read_checkpoints(args.pop("checkpoints"), args.pop("cfg_options"))
        print(measure_checkpoints(pairs, progress=True, **args))
