"""Symbolic tracing (torch.fx) of live ENC networks, and torchvision's and timm's feature extraction on it."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from functional.test_weights import ALL
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from enc_plugin import ENCConv1d, ENCConv2d, ENCConv3d, ENCLinear, fold, to_enc

LAYERS = {
    "1-D": (lambda **kw: ENCConv1d(4, 6, 3, **kw), (2, 4, 7)),
    "2-D": (lambda **kw: ENCConv2d(4, 6, 3, padding=1, padding_mode="reflect", **kw), (2, 4, 7, 7)),
    "3-D": (lambda **kw: ENCConv3d(4, 6, 3, groups=2, **kw), (2, 4, 4, 4, 4)),
    "linear": (lambda **kw: ENCLinear(4, 6, **kw), (3, 4)),
    "linear on tokens": (lambda **kw: ENCLinear(4, 6, bias=False, **kw), (3, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_layers_trace_and_compute_the_same(name, post_norm, training):
    make, shape = LAYERS[name]
    for variant, alpha in [*((v, 1.0) for v in ALL), ("ws", "learnable")]:
        model = nn.Sequential(make(variant=variant, alpha=alpha, post_norm=post_norm)).train(training)
        twin = copy.deepcopy(model)
        traced, x = fx.symbolic_trace(model), torch.randn(shape)
        torch.testing.assert_close(traced(x), twin(x), rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_traced_network_uses_the_live_weight_is_copied_and_pickled():
    model = nn.Sequential(ENCConv2d(3, 4, 3), nn.Flatten(), ENCLinear(4 * 36, 2, post_norm=True)).eval()
    traced, x = fx.symbolic_trace(model), torch.randn(2, 3, 8, 8)
    model[0].weight.data[0].mul_(torch.linspace(0, 1, 3)[:, None, None])
    assert torch.equal(traced(x), model(x))
    traced(x).sum().backward()
    assert model[0].weight.grad.any()
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(other(x), model(x))


def test_a_network_traced_in_train_mode_takes_a_batch_of_one_in_eval_mode():
    traced = fx.symbolic_trace(nn.Sequential(ENCLinear(4, 3, post_norm=True)).train())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        traced(torch.randn(1, 4))
    assert traced.eval()(torch.randn(1, 4)).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_torchvision_extracts_the_features_of_a_live_network(training):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    names = get_graph_node_names(model)[0]
    to_enc(model)
    model.train(training)
    layers = ("conv1", "conv2", "downsample.0", "fc")
    assert set(get_graph_node_names(model)[0]) >= {name for name in names if not name.endswith(layers)}
    x = torch.randn(2, 3, 32, 32)
    extractor = create_feature_extractor(model, ["layer1", "layer2.0.conv1", "fc"])
    seen = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append(out))
    out, logits = extractor(x), model(x)
    torch.testing.assert_close(out["fc"], logits)
    torch.testing.assert_close(out["layer2.0.conv1"], seen[0])
    if not training:
        folded = create_feature_extractor(fold(model), ["layer1"])(x)
        torch.testing.assert_close(folded["layer1"], out["layer1"], rtol=1e-3, atol=1e-4)


def test_timm_extracts_features_of_a_live_network_through_fx():
    name = "tf_mobilenetv3_small_minimal_100"  # with convolutions that pad in their forward pass
    model = timm.create_model(name, features_only=True, feature_cls="fx", out_indices=(1, 2))
    x = torch.randn(1, 3, 64, 64)
    plain = [tuple(f.shape) for f in model.eval()(x)]

    model = timm.create_model(name)
    to_enc(model)
    nodes = [info["module"] for info in timm.create_model(name, features_only=True).feature_info.info][1:3]
    from timm.models._features_fx import create_feature_extractor as timm_extractor

    features = timm_extractor(model.eval(), nodes)(x)
    assert [tuple(f.shape) for f in features.values()] == plain
