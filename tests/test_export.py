"""Networks leave torch and come back: ONNX, torch.export, torch.compile, copies, pickles; live and folded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from functional.test_weights import ALL
from helpers import TORCH
from surgery.test_fold import randomize_norms
from torch import nn

from enc_plugin import fold, to_enc

onnxruntime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Every kind of layer: grouped and padded convolutions, squeeze-and-excitation, a subclass, linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = timm.layers.Conv2dSame(8, 8, 3, stride=2, groups=2)
        self.se = timm.layers.SEModule(8, rd_channels=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.se(self.same(x)).mean((2, 3)))


def network(variant: str = "ws", alpha: float | str = 1.0, live: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    to_enc(model, variant, alpha)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)  # the small weights that long training leaves
    randomize_norms(model)
    model.eval()
    return model if live else fold(model)


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("variant", "live"), [*((variant, True) for variant in ALL), ("ws", False)], ids=[*ALL, "folded"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_runs_in_onnxruntime_with_equal_outputs(variant, live, tmp_path):
    model = network(variant, "learnable", live)
    torch.onnx.export(model, (X,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("live", [True, False], ids=["live", "folded"])
def test_the_torchscript_exporter_works_too(live, tmp_path):
    model = network(live=live)
    torch.onnx.export(model, (X,), tmp_path / "net.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript_is_compiled_of_the_folded_network():
    model = network(live=True)
    with pytest.raises(ValueError, match=r"torch.jit.script cannot compile ENC layers; script .* enc_plugin.fold"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(fold(model))(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("live", [True, False], ids=["live", "folded"])
@pytest.mark.parametrize("variant", ["ws", "wn"])
def test_torch_export_keeps_outputs_keys_and_round_trips(variant, live):
    if live and TORCH < (2, 7):
        pytest.skip("torch 2.6 does not trace subclasses of the stock layers, such as timm's Conv2dSame")
    model = network(variant, "learnable", live)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert set(program.state_dict) == {key for key in model.state_dict() if not key.endswith("_extra_state")}
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 does not trace subclasses of the stock layers (Conv2dSame)")
@pytest.mark.parametrize(
    ("variant", "training"),
    [
        ("ws", True),
        ("wn", True),
        *(pytest.param(variant, True, marks=pytest.mark.slow) for variant in ("fro", "centered_fro")),
        ("ws", False),
    ],
)
def test_compiled_in_one_graph_with_the_same_outputs_and_gradients(variant, training):
    # In float64: a batch norm over two samples makes much of the rounding in which the compiled formula differs.
    model = network(variant, "learnable").train(training).double()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, expected = compiled(X.double()), eager(X.double())
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    largest = max(q.grad.abs().max().item() for q in eager.parameters())
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-7, atol=1e-9 * largest)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("live", [True, False], ids=["live", "folded"])
def test_copies_are_whole_and_independent(duplicate, live):
    model = network(live=live)
    other = duplicate(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(X), model(X))
    before = model(X)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(model(X), before)
    if live:
        torch.testing.assert_close(fold(other)(X), other(X), rtol=1e-4, atol=1e-4)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_functional_call_and_vmap_see_the_weights_they_are_given():
    model = network()
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    doubled["head.bias"] = model.head.bias
    out = torch.func.functional_call(model, {"stem.weight": doubled["stem.weight"]}, (X,))
    torch.testing.assert_close(out, model(X))  # scale-free
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(X)
    assert jacobian.shape == (2, 5, 3, 9, 9)
