"""Attack trained checkpoints (FGSM, PGD) in pixel space; writes accuracy against eps as a table, JSON and figures."""

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
    parser.add_argument("--pgd-steps", type=int, default=0, help="also attack by PGD with this many steps for each eps")
    parser.add_argument("--names", nargs="+", help="one name for each checkpoint (default: the config's)")
    parser.add_argument("--num-samples", type=int, help="samples, spread over the test set (default: all)")
    parser.add_argument("--batch-size", type=int, help="samples per batch (default: the test dataloader's)")
    parser.add_argument("--num-workers", type=int, default=0, help="data loading processes (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=6, help="samples to show as images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of PGD's random starts (default: %(default)s)")
    parser.add_argument("--out", default="work_dirs/attack", help="folder to write to (default: %(default)s)")
    _bootstrap.add_common_options(parser)
    with _bootstrap.one_line("attack"):
        args = vars(parser.parse_args())
        pairs = _bootstrap.read_checkpoints(args.pop("checkpoints"), args.pop("cfg_options"))
        report = attack_checkpoints(pairs, progress=True, **args)
        print(report)
        print("wrote", *report.files)
