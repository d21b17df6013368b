"""Check the installation, and with --config a config, and say how to repair what does not work."""

import argparse
import ast
import sys
import types
from pathlib import Path

import _bootstrap

# Import the doctor without running enc_plugin/__init__.py, which raises if the environment is broken.
_root = Path(__file__).resolve().parents[1]
_package = types.ModuleType("enc_plugin")
_package.__path__ = [str(_root.parent if _root.name == ".mim" else _root / "enc_plugin")]
sys.modules["enc_plugin"] = _package
from enc_plugin.doctor import run  # noqa: E402

del sys.modules["enc_plugin"]


def _option(text: str) -> tuple[str, object]:
    """Parse KEY=VALUE without mmengine, which may be missing."""
    key, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"{__doc__} It takes about 20 s; with --quick, a few seconds.")
    parser.add_argument("--config", help="config (a file, or package::name) to check: model, dataset and one batch")
    parser.add_argument("--cfg-options", nargs="+", type=_option, metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--device", help="device for the batch, such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="skip the slow checks: gloo and torch.compile")
    parser.add_argument("--seconds", type=float, default=120, help="limit of each slow check (default: %(default)s)")
    args = parser.parse_args()
    with _bootstrap.one_line("doctor"):
        sys.exit(run(args.config, dict(args.cfg_options or []), args.quick, args.seconds, args.device))
