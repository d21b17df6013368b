"""Attack trained checkpoints (FGSM, PGD) in pixel space: accuracy against eps, as a table, JSON and pictures."""

import argparse

import _bootstrap

with _bootstrap.one_line("attack"):
    from enc_plugin.reports.attack_report import attack_checkpoints

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    _bootstrap.add_checkpoints(parser)
    parser.add_argument(
        "--eps",
        nargs="+",
        type=float,
        default=[1, 2, 4, 8],
        help="budgets in 1/255 of the pixel range (default: 1 2 4 8)",
    )
    parser.add_argument(
        "--pgd-steps", type=int, default=0, help="attack by PGD too, with so many gradients for each eps"
    )
    parser.add_argument("--names", nargs="+", help="a name for each checkpoint (default: the config's)")
    parser.add_argument("--num-samples", type=int, help="samples, spread over the test set (default: all)")
    parser.add_argument("--batch-size", type=int, help="samples per batch (default: the test dataloader's)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that load (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6, help="samples to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of PGD's random starts (default: %(default)s)")
    parser.add_argument("--out", default="work_dirs/attack", help="folder to write to (default: %(default)s)")
    _bootstrap.add_common_options(parser)
    with _bootstrap.one_line("attack"):
        args = vars(parser.parse_args())
        pairs = _bootstrap.read_checkpoints(args.pop("checkpoints"), args.pop("cfg_options"))
        report = attack_checkpoints(pairs, progress=True, **args)
        print(report)
        print("wrote", *report.files)
