"""The doctor in real broken environments (packages left out, added, renumbered) and on real bad configs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, ROOT, run_command
from mmengine.config import Config

from enc_plugin.doctor import BROKEN, NOTE, OK, run
from enc_plugin.doctor.config import check_config
from enc_plugin.doctor.finding import examine
from enc_plugin.doctor.weight_decay import examine_decay

DIGITS = CONFIGS / "digits" / "resnet8_enc-ws_1xb64.py"
INSTALLED = Path(torch.__file__).parents[1]


def environment(folder: Path, without: str = "$", dists: tuple[tuple[str, str], ...] = ()) -> Path:
    """Interpreter of a new environment with this one's packages, but for those whose file names match ``without``.

    ``dists`` are (name, version) of distributions that are recorded as installed besides.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in INSTALLED.iterdir():
        if not re.match(rf"({without})|.*enc_plugin|__editable__|__pycache__", entry.name):
            (site / entry.name).symlink_to(entry)
    for name, version in dists:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def doctor(python: Path | str, *arguments: str) -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [python, "tools/doctor.py", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


ENVIRONMENTS = {
    "setuptools 82, which has no pkg_resources": (
        "setuptools|pkg_resources",
        [("setuptools", "82.0.0")],
        [("pkg_resources", r"missing \(setuptools .*pip install 'setuptools<80.9'")],
    ),
    "mmcv and mmcv-lite": ("$", [("mmcv", "2.1.0")], [("mmcv", "both installed.*pip uninstall -y mmcv-lite mmcv")]),
    "mmcv-lite too new, mmpretrain missing": (
        "mmcv_lite|mmpretrain",
        [("mmcv-lite", "2.5.1")],
        [
            ("mmcv", r"2.5.1 \(mmcv-lite\); required: >=2.0,<2.4.*pip install 'mmcv-lite>=2.0,<2.4'"),
            ("mmpretrain", "not installed.*pip install 'mmpretrain>=1.2,<2'"),
        ],
    ),
    "no mmcv at all, mmengine too old": (
        "mmcv|mmengine-",
        [("mmengine", "0.8.4")],
        [
            ("mmcv", "not installed.*pip install 'mmcv-lite>=2.0,<2.4'"),
            ("mmengine", "0.8.4; required: >=0.10.5,<1.*pip install 'mmengine>=0.10.5,<1'"),
        ],
    ),
    "opencv and addict missing": (
        "cv2|opencv|addict",
        [],
        [("mmengine", "importing it fails: .*pip install addict"), ("opencv", "No module named 'cv2'")],
    ),
}


# The environments are made of the installed packages by taking some away.
on_the_stack = pytest.mark.skipif(
    any(dist.name.startswith("onedl-") for dist in distributions()), reason="the forks are what is installed here"
)

# The others are with the slow tests: each costs the import of mmpretrain.
DEFAULT = "setuptools 82, which has no pkg_resources"


@on_the_stack
@pytest.mark.parametrize("name", [n if n == DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in ENVIRONMENTS])
def test_a_broken_environment_is_named_with_its_remedy(name, tmp_path):
    without, dists, expected = ENVIRONMENTS[name]
    code, output = doctor(environment(tmp_path / "env", without, tuple(dists)), "--config", str(DIGITS))
    assert code == 1
    for package, pattern in expected:
        assert re.search(rf"^BROKEN +{package} .*?{pattern}", output, re.M | re.S), output
    assert "fix the environment first" in output
    assert not re.search("BROKEN +(enc_plugin|checkpoints)", output)  # which would only follow from it


@on_the_stack
def test_the_forks_are_fine_and_a_plugin_found_here_alone_is_noted(tmp_path):
    forks = (("onedl-mmcv", "2.3.6"), ("onedl-mmengine", "0.10.12"), ("onedl-mmpretrain", "1.3.6"))
    code, output = doctor(environment(tmp_path / "env", r"(mmcv_lite|mmengine|mmpretrain)-.*info", forks))
    assert code == 0, output
    assert re.search(r"^ok +mmcv +2.3.6 \(onedl-mmcv\)$", output, re.M)
    assert re.search(r"^note +importable .*do not find the plugin", output, re.M)
    assert re.search(r"^ok +checkpoints .*loaded under weights_only", output, re.M)


@on_the_stack
@pytest.mark.slow
def test_torch_alone_is_fine_until_a_config_is_asked_about(tmp_path):
    python = environment(
        tmp_path / "env", "mmcv|mmengine|mmpretrain|torchvision|cv2|opencv|rich|setuptools|pkg_resources"
    )
    code, output = doctor(python)
    assert code == 0, output
    assert re.search(
        r"^note +mmengine +not installed: layers, to_enc.*pip install 'enc-plugin\[lite\]'", output, re.M | re.S
    )
    assert re.search(r"^ok +enc_plugin ", output, re.M)
    code, output = doctor(python, "--config", str(DIGITS))
    assert code == 1
    assert re.search(r"^BROKEN +config +not checked", output, re.M)


@pytest.mark.slow
def test_a_working_environment_passes_with_every_check(tmp_path):
    done = run_command([sys.executable, "tools/doctor.py", "--config", str(DIGITS)])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40  # one screen
    states = {line.split()[1]: line.split()[0] for line in lines if line.startswith(("ok", "note"))}
    for check in ("torch", "mmcv", "opencv", "enc_plugin", "checkpoints", "gloo", "torch.compile", "ENC", "forward"):
        assert states[check] == "ok", done.stdout
    assert "10 layers (ws); 1 with an added batch norm: head.fc" in done.stdout
    assert not re.search("INFO|WARNING|Warning", done.stdout + done.stderr)


@pytest.mark.slow
def test_a_check_that_does_not_end_is_given_up(capsys):
    assert run(seconds=0.01) == 0
    output = capsys.readouterr().out
    assert re.search(r"note +gloo .*not done within 0 s", output)
    assert re.search(r"note +torch.compile .*not done within 0 s", output)


BAD_CONFIGS = {
    "a misspelt type": (
        'model = dict(type="ENCImageClasifier")',
        "types",
        "model.type = 'ENCImageClasifier' is not in any registry",
        "ENCImageClassifier",
    ),
    "a misspelt hook": (
        'custom_hooks = [dict(type="GRBHook")]',
        "types",
        "custom_hooks.0.type = 'GRBHook' is not in any registry",
        "GBRHook",
    ),
    "no custom_imports": (
        "custom_imports = dict(_delete_=True, imports=[])",
        "custom_imports",
        "does not import the plugin",
        'custom_imports = dict(imports=["enc_plugin"])',
    ),
    "a data_root that is not there": (
        'train_dataloader = dict(dataset=dict(_delete_=True, type="CustomDataset", data_root="/not/there"))',
        "data",
        "train: train_dataloader.dataset.data_root = '/not/there' does not exist",
        "--cfg-options train_dataloader.dataset.data_root=PATH",
    ),
    "a head with the wrong in_channels": (
        "model = dict(head=dict(in_channels=32))",
        "forward",
        "RuntimeError",
        "the head expects 32 channels, but gets 64: set model.head.in_channels=64",
    ),
    "fewer classes than the data": (
        "model = dict(head=dict(num_classes=7))",
        "data",
        "10 classes in the data, model.head.num_classes = 7",
        "num_classes=10",
    ),
    "more of the top than there are classes": (
        "model = dict(head=dict(num_classes=10))\nval_evaluator = dict(topk=(1, 11))",
        "data",
        "val_evaluator asks for the top 11 of 10 classes",
        "set dict(topk=1) for val_evaluator",
    ),
    # RepLKNet takes a conv_cfg and ignores it.
    "a conv_cfg that reaches no layer": (
        'model = dict(type="ImageClassifier", backbone=dict(_delete_=True, type="RepLKNet", conv_cfg=dict('
        'type="ENCConv2d"), arch=dict(large_kernel_sizes=[5], layers=[1], channels=[64], small_kernel=3, dw_ratio=1), '
        "out_indices=(0,), strides=(2,), dilations=(1,)))",
        "ENC",
        "no layer of the network is ENC",
        'model = dict(type="ENCImageClassifier")',
    ),
    "an argument that does not exist": (
        "model = dict(backbone=dict(deep=True))",
        "model",
        "unexpected keyword argument 'deep'",
        "check the arguments",
    ),
    "a module that is not there": (
        'custom_imports = dict(imports=["enc_plugin", "no_such_module"])',
        "config",
        "no_such_module",
        "install the modules of custom_imports",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_named_with_its_remedy(name, tmp_path):
    line, check, found, advice = BAD_CONFIGS[name]
    config = tmp_path / "bad.py"
    config.write_text(f"_base_ = {str(DIGITS)!r}\n{line}\n")
    broken = [finding for finding in check_config(str(config)) if finding.state == BROKEN]
    assert [(f.name, found in f.found, advice in f.advice) for f in broken] == [(check, True, True)], broken


def test_parts_that_a_pure_python_config_imports_need_no_custom_imports_and_no_scope(tmp_path):
    config = tmp_path / "pure.py"
    lines = (
        "from enc_plugin.engine import ENCRunner\n",
        "runner_type = ENCRunner",
        "model = dict()",
        "default_scope = None",
    )
    config.write_text("\n".join(lines))
    findings = {finding.name: finding for finding in check_config(str(config))}
    assert findings["custom_imports"].state == OK
    assert "enc_plugin.engine.ENCRunner" in findings["custom_imports"].found


def test_two_bases_with_one_key_are_named_with_the_remedy(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("model = dict(type='ENCImageClassifier')\n")
    (tmp_path / "both.py").write_text("_base_ = ['./a.py', './b.py']\n")
    (finding,) = check_config(str(tmp_path / "both.py"))
    assert finding.state == BROKEN
    assert "model" in finding.found
    assert "may not set the same key" in finding.advice


def test_an_imagenet_config_is_examined_without_its_data():
    findings = {f.name: f for f in check_config(str(CONFIGS / "seresnet50_enc_8xb32.py"))}
    assert findings["data"].state == BROKEN
    assert re.match(r"86 layers \(ws\); 33 with an added batch norm", findings["ENC"].found)
    assert findings["forward"].state == OK
    assert "two random images of 224 x 224 pixels" in findings["forward"].found


@pytest.mark.parametrize(
    ("decay", "counts", "state", "found"),
    [(1e-3, 1, NOTE, "0.2 e-folds"), (1e-2, 4, NOTE, "0.5 e-folds"), (1e-2, 1, OK, "2 e-folds"), (0, 1, OK, "no")],
)
def test_a_decay_that_hardly_acts_is_noted_with_its_e_folds(decay, counts, state, found):
    """100 steps of learning rate 0.1 with momentum 0.9: 2 * decay * 10 / 0.1."""
    sgd = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=decay)
    optim_wrapper = dict(optimizer=sgd, accumulative_counts=counts)
    loops = dict(train_cfg=dict(max_epochs=10), train_dataloader=dict(batch_size=100))
    (finding,) = examine("decay", examine_decay, Config(dict(optim_wrapper=optim_wrapper, **loops)), 901)
    assert finding.state == state
    assert finding.found.startswith(found)
    if state == NOTE:
        assert f"weight_decay x {counts / (200 * decay):.2g}" in finding.advice


def test_options_change_the_config_and_a_plain_one_is_noted():
    findings = list(check_config(str(CONFIGS / "digits" / "resnet8_1xb64.py"), {"model.head.in_channels": 8}))
    assert {f.name: f.state for f in findings} | {"ENC": NOTE, "forward": BROKEN} == {f.name: f.state for f in findings}
