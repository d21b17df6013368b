"""Unpack CIFAR-10 (cifar10.zip or cifar-10-python.tar.gz) into data/cifar10/{train,test}/<class>/."""

import argparse

import _bootstrap

with _bootstrap.one_line("prepare_cifar10"):
    from enc_plugin.datasets.prepare import prepare_cifar10

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", help="cifar10.zip (ImageFolder layout) or the official cifar-10-python.tar.gz")
    parser.add_argument("--out", default="data/cifar10", help="folder to create (default: %(default)s)")
    args = parser.parse_args()
    with _bootstrap.one_line("prepare_cifar10", "nothing was written; run it again"):
        out = prepare_cifar10(args.archive, args.out)
    print(f"CIFAR-10 is in {out}")
