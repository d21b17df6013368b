"""Attack trained checkpoints (FGSM, PGD) in pixel space: accuracy against eps, as a table, JSON and pictures."""

import argparse

import _bootstrap

with _bootstrap.one_line("attack"):
    from enc_plugin.build import load_config
    from enc_plugin.reports.attack import attack_checkpoints

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CONFIG CHECKPOINT",
        help="config and checkpoint; several pairs are compared side by side",
    )
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
    args = parser.parse_args()
    if len(args.checkpoints) % 2:
        parser.error(f"expected pairs of CONFIG and CHECKPOINT, got {len(args.checkpoints)} arguments")
    with _bootstrap.one_line("attack"):
        configs = [load_config(path, args.cfg_options) for path in args.checkpoints[::2]]
        report = attack_checkpoints(
            list(zip(configs, args.checkpoints[1::2], strict=True)),
            args.eps,
            pgd_steps=args.pgd_steps,
            names=args.names,
            num_samples=args.num_samples,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            pictures=args.pictures,
            seed=args.seed,
            device=args.device,
            out=args.out,
            progress=True,
        )
    print(report)
    print("wrote", *report.files)
