"""The package where mmengine, mmpretrain, timm or all but torch are missing: processes that cannot import them."""

from __future__ import annotations

import subprocess
import sys

from helpers import ROOT

from enc_plugin.installation import is_installed, version_of

STACK = ("mmengine", "mmcv", "mmpretrain")
ALL = (*STACK, "timm", "numpy", "torchvision", "rich", "matplotlib", "scipy", "sklearn", "cv2", "yaml")
# Where the maintained forks are installed, that extra mends them.
EXTRA = f"pip install 'enc-plugin[{'onedl' if version_of('onedl-mmengine') else 'lite'}]'"
# No finder finds a hidden module: it is absent for find_spec and for the import statement, as if never installed.
HIDE = """
import sys, warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

hidden = HIDDEN
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def python(code: str, hidden: tuple[str, ...], folder=None) -> str:
    """What a process prints that cannot import the modules ``hidden``; ``folder`` comes first on its path."""
    path = f"sys.path[:0] = [{str(folder)!r}]" if folder else ""
    script = f"{HIDE.replace('HIDDEN', repr(hidden))}\n{path}\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Prints the type and the text of the error of each statement.
ERRORS = """
for statement in STATEMENTS:
    try:
        exec(statement)
    except Exception as error:
        print(f"{statement} -> {type(error).__name__}: {error}")
"""


def test_the_core_computes_with_torch_alone():
    code = """
import copy, math
import enc_plugin, torch
from enc_plugin import *
from enc_plugin.functional import bound_chain, enc_weight, fgsm, gbr, shifted_l2_grad
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
assert len(to_enc(net)) == 2
table = enc_plugin.audit(net)
before = net[0].weight.detach().clone()
optimizer = torch.optim.SGD(param_groups_enc(net, weight_decay=0.1, shift_eps=1.0), lr=1.0)
add_shift(optimizer)
for parameter in net.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
# Zero gradients: the step is the decay alone, on weight - eps * (its gradient of the row's standard deviation).
assert torch.allclose(before - net[0].weight, 0.1 * shifted_l2_grad(before, "ws", 1.0), atol=1e-6)
x = torch.rand(2, 3, 6, 6)
net.eval()
assert (fold(copy.deepcopy(net))(x) - net(x)).abs().max() < 1e-5
linear = nn.Linear(6, 3)
values = gbr(linear, torch.rand(4, 6))
assert torch.allclose(values, linear.weight.square().sum().expand(4))
assert fgsm(net, x, torch.tensor([0, 1]), 0.1).shape == x.shape
assert math.isclose(enc_weight(torch.randn(3, 4)).square().sum().item(), 1.0, rel_tol=1e-5)
assert bound_chain([torch.eye(2)])["product"] == 2
print(sorted(m for m in hidden if m in sys.modules), [p for p in ("engine", "models", "datasets") if p in globals()])
"""
    assert python(code, ALL).split("\n")[0] == "[] []"


def test_parts_that_need_mmengine_name_the_extra():
    statements = (
        "import enc_plugin.engine",
        "from enc_plugin.models import ENCImageClassifier",
        "from enc_plugin import datasets",
        "enc_plugin.engine",
        "from enc_plugin.deploy import fold_checkpoint",
        "import enc_plugin.reports.gbr_report",
        "import enc_plugin.reports.attack_report",
        "import enc_plugin.reports.compare",
        "import enc_plugin.launch",
        "import lab.study",
        "from enc_plugin.datasets.prepare import prepare_cifar10",
    )
    printed = python("import enc_plugin" + ERRORS.replace("STATEMENTS", repr(statements)), ALL).splitlines()
    assert len(printed) == len(statements)
    for statement, line in zip(statements, printed, strict=True):
        assert line.startswith(f"{statement} -> ImportError: ")
        assert f"needs mmengine, which is not installed; run: {EXTRA}" in line


def test_timm_parts_need_torch_and_timm_alone():
    code = """
import enc_plugin.timm, timm
net = timm.create_model("enc_resnet18", num_classes=3)
print(len(enc_plugin.audit(net)), len(enc_plugin.timm.param_groups_enc(net, weight_decay=1e-4)) > 1,
      [m for m in hidden if m in sys.modules])
"""
    assert python(code, STACK).split() == ["21", "True", "[]"]


def test_with_mmengine_alone_what_can_be_registered_is():
    statements = (
        "from enc_plugin.models import ENCImageClassifier",
        "from enc_plugin import datasets",
        "enc_plugin.models.no_such_part",
    )
    code = (
        "import enc_plugin\nfrom mmengine.registry import HOOKS, MODELS, RUNNERS, OPTIM_WRAPPER_CONSTRUCTORS\n"
        "print([name for registry, name in ((HOOKS, 'GBRHook'), (HOOKS, 'FGSMHook'), (HOOKS, 'ENCGuardHook'), "
        "(RUNNERS, 'ENCRunner'), (OPTIM_WRAPPER_CONSTRUCTORS, 'ENCOptimWrapperConstructor'), (MODELS, 'ENCLinear'), "
        "(MODELS, 'WNConv2d'), (MODELS, 'GBRPenalty')) "
        "if registry.get(name) is None], [m for m in hidden if m in sys.modules])" + ERRORS
    )
    printed = python(code.replace("STATEMENTS", repr(statements)), ("mmcv", "mmpretrain")).splitlines()
    assert printed[0] == "[] []"
    for line in printed[1:3]:
        assert "ImportError: this part of enc_plugin needs mmpretrain, which is not installed" in line
        assert EXTRA in line
    assert "AttributeError" in printed[3]


def test_an_mmengine_that_is_broken_shows_its_own_error(tmp_path):
    (tmp_path / "mmengine").mkdir()
    (tmp_path / "mmengine" / "__init__.py").write_text("raise ImportError('libGL.so.1: cannot open shared object')")
    code = ERRORS.replace("STATEMENTS", "('import enc_plugin',)")
    assert "-> ImportError: libGL.so.1" in python(code, (), tmp_path)


def test_a_timm_that_is_broken_is_not_called_missing():
    code = ERRORS.replace("STATEMENTS", "('import enc_plugin.timm',)")
    assert "-> ModuleNotFoundError: No module named 'torchvision'" in python(code, (*STACK, "torchvision"))


def test_a_folder_is_no_installed_package(tmp_path, monkeypatch):
    (tmp_path / "checkout_of_something").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("checkout_of_something")
    assert is_installed("torch")
