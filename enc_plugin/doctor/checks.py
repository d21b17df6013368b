"""What is installed, what works, and what to do about what does not; the library behind ``tools/doctor.py``.

Nothing outside the standard library is imported before it is examined: the doctor runs where the rest does not.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..environment import MMCV_RANGE, is_installed
from ..environment import PACKAGES as STACK
from ..refused import Refused, describe
from .finding import BROKEN, NOTE, OK, Finding

# Distributions that bring each module (the onedl forks keep the modules' names), and the range of the original. The
# forks count their own versions, and refuse what does not fit them when they are imported.
_PACKAGES = {
    "torch": (("torch",), (2, 6), None),
    "torchvision": (("torchvision",), None, None),
    "mmengine": (("mmengine", "mmengine-lite", "onedl-mmengine"), (0, 10, 5), (1,)),
    "mmcv": (("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv", "onedl-mmcv-lite"), *MMCV_RANGE),
    "mmpretrain": (("mmpretrain", "onedl-mmpretrain"), (1, 2), (2,)),
}
_INSTALL = {"mmcv": "mmcv-lite>=2.0,<2.4", "mmengine": "mmengine>=0.10.5,<1", "mmpretrain": "mmpretrain>=1.2,<2"}
_EXTRAS = ("timm", "safetensors", "tensorboard", "wandb", "mlflow")
# Transforms whose own lists name parts of other libraries.
_FOREIGN = ("Albumentations", "Albu")

_GLOO = """
import multiprocessing, sys, torch, torch.distributed as dist
def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    total = torch.ones(1) * (rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    sys.exit(0 if total.item() == 3 else 1)
torch.set_num_threads(1)
processes = [multiprocessing.get_context("fork").Process(target=work, args=(r, sys.argv[1])) for r in range(2)]
[p.start() for p in processes]
[p.join() for p in processes]
sys.exit(max(p.exitcode for p in processes))
"""
_COMPILE = """
import torch
x = torch.randn(64)
assert torch.allclose(torch.compile(lambda x: torch.relu(x) * 2 + 1)(x), torch.relu(x) * 2 + 1)
"""


def run(config: str | None = None, options: dict | None = None, quick: bool = False, seconds: float = 120) -> int:
    """Examine the environment, and with ``config`` that config; print one line a finding.

    Args:
        config: Config to examine: it is built, its data looked for, and one batch sent through the network.
        options: Changes to the config, as for ``--cfg-options``.
        quick: Leave out what starts processes (gloo, ``torch.compile``).
        seconds: Time limit of each process.

    Returns:
        Exit code: 1 if anything is broken, else 0.
    """
    logging.disable(logging.CRITICAL)  # the libraries' loggers: what is wrong is in the findings
    findings = list(check_environment(quick, seconds))
    if config is not None:
        if any(finding.state == BROKEN for finding in findings) or not is_installed("mmengine"):
            findings.append(Finding("config", BROKEN, "not examined", "mend the environment first"))
        else:
            findings += check_config(config, options)
    logging.disable(logging.NOTSET)
    _show(findings)
    return int(any(finding.state == BROKEN for finding in findings))


def check_environment(quick: bool = False, seconds: float = 120) -> Iterator[Finding]:
    """Findings on this interpreter, its packages and this machine."""
    old = sys.version_info < (3, 10)
    yield Finding("python", BROKEN if old else OK, platform.python_version(), "use Python 3.10 or later" if old else "")
    alone = not any(map(is_installed, STACK))
    packages = [x for module in (["torch"] if alone else _PACKAGES) for x in _guard(module, _package, module)]
    if alone:
        packages.append(_torch_alone())
    else:
        packages += [*_guard("pkg_resources", _pkg_resources), *_guard("opencv", _opencv)]
    yield from packages
    if any(finding.state == BROKEN for finding in packages):
        return  # what follows fails for the same reasons
    yield from _guard("enc_plugin", _plugin)
    yield from _guard("importable", _importable_elsewhere, seconds)
    if not alone:
        yield from _guard("checkpoints", _checkpoints)
    yield from _guard("cuda", _cuda)
    if not quick:
        yield from _guard("gloo", _gloo, seconds)
        yield from _guard("torch.compile", _compile, seconds)
    yield from _guard("threads", _threads)
    yield from _guard("extras", _extras)


def check_config(config: str, options: dict | None = None) -> Iterator[Finding]:
    """Findings on a config, in an environment that works."""
    from ..build import load_config

    try:
        cfg = load_config(config, options)
    except (Refused, FileNotFoundError) as error:
        yield _refusal("config", error)
        return
    yield Finding("config", OK, str(config))
    parts: dict[str, object] = {"samples": {}, "model": None}
    broken: set[str] = set()
    for name, check, needed in _CHECKS:
        if broken & needed:
            continue
        for finding in _guard(name, check, cfg, parts):
            if finding.state == BROKEN:
                broken.add(name)
            yield finding


# The environment


def _package(module: str) -> Iterator[Finding]:
    names, low, high = _PACKAGES[module]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    install = f"pip install '{_INSTALL.get(module, module)}'"
    if len(found) > 1:
        text = " and ".join(f"{name} {version}" for name, version in found.items())
        remedy = f"pip uninstall -y {' '.join(found)}, then install one of them"
        yield Finding(module, BROKEN, f"{text} are both installed, and overwrite each other's files", remedy)
        return
    if not found:
        if importlib.util.find_spec(module) is None:
            yield Finding(module, BROKEN, "not installed", install)
            return
        found = {module: ""}  # from a source folder
    (name, version), *_ = found.items()
    text = f"{version} ({name})" if name != module else version or "from a source folder"
    number = tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
    if number and name in names[:2] and ((low and number < low) or (high and number >= high)):
        wanted = " and ".join(f"{sign} {'.'.join(map(str, x))}" for sign, x in ((">=", low), ("<", high)) if x)
        yield Finding(module, BROKEN, f"{text}; needed is {wanted}", install.replace("mmcv-lite", name))
        return
    try:
        _quietly(importlib.import_module, module)
    except Exception as error:
        yield Finding(
            module, BROKEN, f"{text}, but importing it fails: {describe(error)}", _import_advice(error, install)
        )
        return
    yield Finding(module, OK, text)


def _torch_alone() -> Finding:
    found = "not installed: layers, to_enc, fold, decay and enc_plugin.timm work; configs and other tools do not"
    return Finding("mmengine", NOTE, found, "pip install 'enc-plugin[lite]' for mmengine, mmpretrain and mmcv-lite")


def _pkg_resources() -> Iterator[Finding]:
    setuptools = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "none"
    try:
        _quietly(importlib.import_module, "pkg_resources")
    except ImportError:
        found = f"missing (setuptools {setuptools}); mmengine needs it for 'mmpretrain::' base configs"
        yield Finding("pkg_resources", BROKEN, found, "pip install 'setuptools<80.9'")
        return
    yield Finding("pkg_resources", OK, f"of setuptools {setuptools}")


def _opencv() -> Iterator[Finding]:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        advice = "pip install opencv-python-headless"
        if not isinstance(error, ModuleNotFoundError):  # libGL, libgthread
            advice = f"apt-get install libgl1 libglib2.0-0, or {advice} in place of opencv-python"
        yield Finding("opencv", BROKEN, describe(error), advice)
        return
    yield Finding("opencv", OK, cv2.__version__)


def _plugin() -> Iterator[Finding]:
    try:
        plugin = _quietly(importlib.import_module, "enc_plugin")
    except ImportError as error:
        yield Finding("enc_plugin", BROKEN, f"importing it fails: {error}", "do what the message says")
        return
    where = f"{plugin.__version__}, {Path(plugin.__file__).parent}"
    if not is_installed("mmengine"):
        yield Finding("enc_plugin", OK, where)
        return
    from mmengine.registry import HOOKS, MODELS

    missing = [x for x, r in (("ENCImageClassifier", MODELS), ("ENCAuditHook", HOOKS)) if r.get(x) is None]
    if missing:
        yield Finding("enc_plugin", BROKEN, f"{', '.join(missing)} not in the registry", "pip install -e . again")
        return
    yield Finding("enc_plugin", OK, f"{where}; its parts are registered")


def _importable_elsewhere(seconds: float) -> Iterator[Finding]:
    """A process that starts in another folder, as mim and other tools' ``custom_imports`` do, finds this plugin."""
    here = Path(__file__).resolve().parent
    code = "import importlib.util; s = importlib.util.find_spec('enc_plugin'); print(s and s.origin or '')"
    with tempfile.TemporaryDirectory() as folder:
        out = _process(["-c", code], seconds, cwd=folder).stdout.strip()
    if not out:
        found = "other tools (mim, mmpretrain's own) do not find the plugin; the tools of this folder do"
        yield Finding("importable", NOTE, found, f"pip install -e {here.parent}")
    elif Path(out).resolve().parent != here:
        found = f"other tools find another copy: {Path(out).parent}"
        yield Finding("importable", NOTE, found, f"pip install -e {here.parent}, or run the tools of that copy")
    else:
        yield Finding("importable", OK, "found from any folder")


def _checkpoints() -> Iterator[Finding]:
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import load_checkpoint, save_checkpoint

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "checkpoint.pth"))
        history = {"train/loss": HistoryBuffer([1.0, 2.0], [1, 1])}
        save_checkpoint({"state_dict": layer.state_dict(), "message_hub": {"log_scalars": history}}, path)
        _quietly(load_checkpoint, other, path)
    if not torch.equal(layer.weight, other.weight):
        yield Finding("checkpoints", BROKEN, "a checkpoint did not come back as it was written", "reinstall torch")
        return
    yield Finding("checkpoints", OK, "one of mmengine's was written and loaded under weights_only")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        kind = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA device"
        yield Finding("cuda", OK, f"{kind}: the CPU is used, distributed by gloo (nccl needs CUDA)")
        return
    value = torch.ones(8, device="cuda").sum().item()
    nccl = "nccl" if torch.distributed.is_nccl_available() else "no nccl"
    state = OK if value == 8 else BROKEN
    yield Finding("cuda", state, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {nccl}")


def _gloo(seconds: float) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        done = _process(["-c", _GLOO, folder], seconds)
    if done.returncode == 0:
        yield Finding("gloo", OK, "two processes summed a tensor")
        return
    advice = "set GLOO_SOCKET_IFNAME=lo if the host name does not resolve; one process works without it"
    yield Finding("gloo", NOTE, f"distributed training on the CPU fails: {_last_line(done)}", advice)


def _compile(seconds: float) -> Iterator[Finding]:
    done = _process(["-c", _COMPILE], seconds)
    if done.returncode == 0:
        yield Finding("torch.compile", OK, "compiled a function")
        return
    advice = "install a C++ compiler (apt-get install g++), or leave `compile` out of the config"
    yield Finding("torch.compile", NOTE, f"does not work: {_last_line(done)}", advice)


def _threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    values = ", ".join(f"{k}={os.environ.get(k, 'unset')}" for k in (*wanted, "OMP_NUM_THREADS"))
    found = f"{torch.get_num_threads()} threads on {cores} cores; {values}"
    spinning = [k for k, v in wanted.items() if os.environ.get(k, "").lower() != v]
    if torch.get_num_threads() > cores or spinning:
        advice = "export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 OMP_NUM_THREADS=<cores / processes>"
        yield Finding("threads", NOTE, f"{found}: idle threads slow other processes down", advice)
        return
    yield Finding("threads", OK, found)


def _extras() -> Iterator[Finding]:
    found, missing = [], []
    for name in _EXTRAS:
        version = next((v for n in (name, f"{name}-skinny") if (v := _version(n))), None)
        (found if version else missing).append(f"{name} {version}" if version else name)
    advice = f"only if you want them: pip install {' '.join(missing)}" if missing else ""
    text = ", ".join(found) or "none"
    yield Finding("extras", OK, f"{text}; not installed: {', '.join(missing)}" if missing else text, advice)


# A config


def _custom_imports(cfg, parts: dict) -> Iterator[Finding]:
    imports = (cfg.get("custom_imports") or {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    used = sorted({name for _, name in _type_names(cfg.to_dict()) if name.split(".")[-1] in _own_names()})
    if not used:
        yield Finding("custom_imports", NOTE, "this config uses no part of the plugin", "see the README: Use it")
    elif not any(name.split(".")[0] == "enc_plugin" for name in imports):
        found = f"the config names {', '.join(used)} and does not import the plugin: 'not in the registry' elsewhere"
        yield Finding("custom_imports", BROKEN, found, 'add: custom_imports = dict(imports=["enc_plugin"])')
    else:
        yield Finding("custom_imports", OK, f"the plugin, for {', '.join(used)}")


def _types(cfg, parts: dict) -> Iterator[Finding]:
    known = _known_names()
    for key, name in _type_names(cfg.to_dict()):
        if name.split(".")[-1] not in known:
            near = difflib.get_close_matches(name, known, n=3)
            advice = (
                f"did you mean {' or '.join(near)}?" if near else "add the package that defines it to custom_imports"
            )
            yield Finding("types", BROKEN, f"{key} = {name!r} is not in any registry", advice)


def _data(cfg, parts: dict) -> Iterator[Finding]:
    from mmengine.registry import init_default_scope

    from ..build import build_dataset
    from ..engine.preflight import check_metrics, find_labels

    init_default_scope(cfg.get("default_scope", "mmpretrain"))
    labels_fit = True
    for split in ("train", "val", "test"):
        key = f"{split}_dataloader"
        settings = (cfg.get(key) or {}).get("dataset")
        if settings is None or (split == "test" and settings == (cfg.get("val_dataloader") or {}).get("dataset")):
            continue
        try:
            dataset = _quietly(build_dataset, cfg, split)
        except Refused as error:
            yield Finding("data", BROKEN, f"{split}: {error.found}", error.advice)
            continue
        try:
            parts["samples"][split] = [_quietly(dataset.__getitem__, i % len(dataset)) for i in range(2)]
        except Exception as error:
            yield Finding("data", BROKEN, f"{split}: {describe(error)}", f"check {key}: its paths and its pipeline")
            continue
        yield Finding("data", OK, f"{split}: {len(dataset):,} samples of {settings['type']}, two were read")
        try:
            notes = find_labels(key, dataset, _num_classes(cfg))
        except Refused as error:
            if labels_fit:  # the other splits have the same classes
                yield _refusal("data", error)
            labels_fit = False
            continue
        yield from (Finding("data", NOTE, note) for note in notes)
    for name in ("val_evaluator", "test_evaluator"):
        metrics = cfg.get(name) or []
        check_metrics(name, [metrics] if isinstance(metrics, dict) else metrics, _num_classes(cfg))


def _model(cfg, parts: dict) -> Iterator[Finding]:
    from mmengine.model import BaseModel
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get("default_scope", "mmpretrain"))
    settings = cfg.model.to_dict()
    if cfg.get("data_preprocessor") is not None:
        settings.setdefault("data_preprocessor", cfg.data_preprocessor.to_dict())
    try:
        model: BaseModel = _quietly(MODELS.build, settings)
        _quietly(model.init_weights)
    except Exception as error:
        yield Finding("model", BROKEN, describe(error), "check the arguments of `model` in the config")
        return
    parts["model"] = model
    size = sum(parameter.numel() for parameter in model.parameters())
    yield Finding("model", OK, f"{type(model).__name__}, {size:,} parameters")


def _enc(cfg, parts: dict) -> Iterator[Finding]:
    from ..convert import enc_layers
    from ..engine.preflight import check_is_enc, type_names
    from ..surgery.eligible import Evidence

    layers = list(enc_layers(parts["model"]))
    check_is_enc(cfg, parts["model"])
    if layers:
        normed = [name for name, layer in layers if layer.enc_norm is not None]
        names = ", ".join(normed[:4]) + (", ..." if len(normed) > 4 else "")
        kinds = ", ".join(sorted({layer.enc_variant for _, layer in layers}))
        text = f"{len(layers)} layers ({kinds}); {len(normed)} with a batch norm of their own"
        yield Finding("ENC", OK, f"{text}: {names}" if normed else text)
        owners = {layer for _, layer in layers if layer.enc_norm is not None}
        bare = [name for name in Evidence(parts["model"]).without_norm(owners) if name in dict(layers)]
        if bare:
            found = f"{len(bare)} layers have no norm behind them: {', '.join(bare[:4])}{', ...' * (len(bare) > 4)}"
            yield Finding("ENC", NOTE, found, "enc=dict(post_norm=True) gives each of them a batch norm of its own")
        if not normed and "ENCImageClassifier" not in type_names(cfg.model):
            found = "the classifier is not ENC: conv_cfg reaches convolutions alone"
            yield Finding("ENC", NOTE, found, 'model = dict(type="ENCImageClassifier") reaches every layer')
    else:
        yield Finding("ENC", NOTE, "a plain network", 'for ENC: model = dict(type="ENCImageClassifier")')


def _forward(cfg, parts: dict) -> Iterator[Finding]:
    import torch
    from mmengine.dataset import pseudo_collate
    from mmpretrain.structures import DataSample

    from ..engine.preflight import why_step_fails

    model = parts["model"]
    torch.manual_seed(0)
    chosen = next(iter(parts["samples"].values()), None)
    if chosen is None:
        size = _image_size(cfg)
        image = torch.randint(256, (3, size, size), dtype=torch.uint8)
        chosen = [{"inputs": image, "data_samples": DataSample().set_gt_label(i)} for i in range(2)]
        source = f"two made-up images of {size} x {size} pixels"
    else:
        source = f"two samples of {tuple(chosen[0]['inputs'].shape)}"
    try:
        batch = model.train().data_preprocessor(pseudo_collate(chosen), training=True)
        losses = model(**batch, mode="loss")
        model.eval()(batch["inputs"])
    except Exception as error:
        yield Finding("forward", BROKEN, describe(error), why_step_fails(model, batch["inputs"]))
        return
    total = sum(value.sum().item() for key, value in losses.items() if "loss" in key)
    if total != total or abs(total) == float("inf"):
        yield Finding("forward", BROKEN, f"{source}: the loss is {total}", "check the data_preprocessor's mean and std")
        return
    yield Finding("forward", OK, f"{source}: loss {total:.4g}")


def _run(cfg, parts: dict) -> Iterator[Finding]:
    from ..engine.preflight import rehearse

    try:
        _quietly(rehearse, cfg)
    except Refused:
        raise
    except Exception as error:
        yield Finding("run", BROKEN, describe(error), "a run of this config ends so before its first step")
        return
    yield Finding("run", OK, "rehearsed up to its first step")


def _image_size(cfg) -> int:
    """Pixels that the test pipeline delivers; 224 if it does not say."""
    loader = cfg.get("val_dataloader") or cfg.get("test_dataloader") or cfg.get("train_dataloader") or {}
    for step in reversed((loader.get("dataset") or {}).get("pipeline") or []):
        size = step.get("crop_size", step.get("scale"))
        if size is not None:
            return int(size[0] if isinstance(size, (tuple, list)) else size)
    return 224


def _num_classes(cfg) -> int | None:
    head = cfg.model.get("head")
    return head.get("num_classes") if isinstance(head, dict) else None


def _type_names(node, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, name) of every registered part that a config names."""
    if isinstance(node, dict):
        for name, value in node.items():
            path = f"{key}.{name}" if key else str(name)
            if isinstance(value, str) and name in ("type", "constructor", "runner_type"):
                yield path, value
            elif not (isinstance(node.get("type"), str) and node["type"].split(".")[-1] in _FOREIGN):
                yield from _type_names(value, path)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _type_names(value, f"{key}.{i}")


def _registries() -> Iterator:
    import mmengine.registry
    import mmpretrain.registry

    seen = set()
    roots = [*vars(mmengine.registry).values(), *vars(mmpretrain.registry).values()]
    while roots:
        registry = roots.pop()
        if isinstance(registry, mmengine.registry.Registry) and id(registry) not in seen:
            seen.add(id(registry))
            roots.extend(registry.children.values())
            yield registry


def _known_names() -> set[str]:
    for registry in _registries():
        _quietly(registry.import_from_location)
    return {name for registry in _registries() for name in registry.module_dict}


def _own_names() -> set[str]:
    parts = ((name, part) for registry in _registries() for name, part in registry.module_dict.items())
    return {name for name, part in parts if getattr(part, "__module__", "").split(".")[0] == "enc_plugin"}


_CHECKS = (
    # Name, check, and the checks without whose success it would only repeat what they found.
    ("custom_imports", _custom_imports, set()),
    ("types", _types, set()),
    ("data", _data, set()),
    ("model", _model, {"types"}),
    ("ENC", _enc, {"types", "model"}),
    ("forward", _forward, {"types", "model"}),
    ("run", _run, {"custom_imports", "types", "data", "model", "ENC", "forward"}),
)


# What all share


def _guard(name: str, check: Callable[..., Iterator[Finding]], *args) -> Iterator[Finding]:
    """The check's findings; what it refuses is one too, and what it does not foresee."""
    try:
        yield from check(*args)
    except Refused as error:
        yield _refusal(name, error)
    except Exception as error:
        yield Finding(name, BROKEN, describe(error), "unexpected: please report it, with this line")


def _refusal(name: str, error: Exception) -> Finding:
    return Finding(name, BROKEN, getattr(error, "found", str(error)), getattr(error, "advice", "check the path"))


def _quietly(function: Callable, *args):
    """Call without the warnings and log lines of the libraries."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        return function(*args)


def _process(arguments: Sequence[str], seconds: float, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, **kwargs)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"not done within {seconds:.0f} s")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {done.returncode}"])[-1][:200]


def _import_advice(error: Exception, install: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.split('.')[0]}"
    if "lib" in str(error) and ".so" in str(error):
        return "a system library or a build for another torch: reinstall it for this torch, or use mmcv-lite"
    return f"reinstall it: {install.replace('install', 'install --force-reinstall')}"


def _show(findings: Sequence[Finding]) -> None:
    """Print the findings: coloured where rich and a terminal are there, plain lines elsewhere."""
    marks = {OK: ("ok    ", "green"), NOTE: ("note  ", "yellow"), BROKEN: ("BROKEN", "bold red")}
    try:
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False)
    except ImportError:
        console = None
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = marks[finding.state]
        if console is None:
            print(f"{mark}  {finding.name.ljust(width)}  {finding.found}")
        else:
            console.print(f"[{style}]{mark}[/]  [bold]{finding.name.ljust(width)}[/]  ", end="")
            console.print(finding.found, markup=False)
        if finding.advice:
            print(f"{'':{width + 8}}  -> {finding.advice}")
    broken = sum(finding.state == BROKEN for finding in findings)
    print(f"{broken} broken" if broken else "everything needed works")
