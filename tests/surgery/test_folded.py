import copy

import pytest
import torch
from mmpretrain.models import build_classifier
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from enc_plugin import audit, to_enc
from enc_plugin.functional import bound_chain, conv_map_sq_norm, gbr


def disturb(model):
    """Statistics and gains as after training, so that folding changes the weights."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            module.weight.data.uniform_(0.3, 3)
    return model


def classifier(backbone, channels, **options):
    return disturb(
        build_classifier(
            dict(
                type="ImageClassifier",
                backbone=dict(type=backbone, **options),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=10, in_channels=channels),
            )
        )
    )


def fused_sq_norm(layer, norm):
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    return fuse(copy.deepcopy(layer).double().eval(), copy.deepcopy(norm).double().eval()).weight.square().sum().item()


def test_resnet_rows_are_the_weights_that_torch_fuses():
    model = classifier("ResNet_CIFAR", 512, depth=18)
    table = audit(model, folded=True, inputs=torch.randn(1, 3, 16, 16))
    modules = dict(model.named_modules())
    assert len(table) == 21
    assert not table.unfolded
    for row in table[:-1]:
        assert row.norms == (row.name.replace("conv", "bn").replace("downsample.0", "downsample.1"),)
        expected = fused_sq_norm(modules[row.name], modules[row.norms[0]])
        assert row.sq_norm == pytest.approx(expected, rel=1e-9)
    assert table[-1].norms == ()
    assert table[-1].sq_norm == pytest.approx(model.head.fc.weight.double().square().sum().item())


def test_enc_rows_count_the_effective_weight_and_the_post_norm():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    to_enc(model)
    disturb(model)
    for row, layer in zip(audit(model, folded=True, inputs=torch.randn(2, 4)), model, strict=True):
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight = nn.Parameter(layer.effective_weight.detach())
        assert row.norms == (f"{row.name}.norm",)
        assert row.sq_norm == pytest.approx(fused_sq_norm(plain, layer.norm), rel=1e-6)
        assert row.map_sq_norm == row.sq_norm


def test_post_norm_and_batch_norm_behind_it_both_fold():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    to_enc(model, post_norm=True)
    disturb(model)
    (row,) = audit(model, folded=True)
    gains = [(n.weight / (n.running_var + n.eps).sqrt()).detach() for n in (model[0].norm, model[1])]
    expected = model[0].effective_weight * (gains[0] * gains[1])[:, None, None, None]
    assert row.norms == ("0.norm", "1")
    assert row.sq_norm == pytest.approx(expected.square().sum().item(), rel=1e-5)


def test_densenet_folds_only_the_norms_that_follow_a_convolution_at_once():
    table = audit(classifier("DenseNet", 1024, arch="121"), folded=True)
    rows = {row.name: row.norms for row in table}
    assert len(table) == 121
    assert rows["backbone.stages.0.block.0.conv1"] == ("backbone.stages.0.block.0.norm2",)
    assert rows["backbone.stages.0.block.0.conv2"] == ()  # concatenated before the next norm reads it
    assert "backbone.stages.0.block.1.norm1" in table.unfolded
    assert len(table.unfolded) == 62
    assert "62 batch norms do not fold into a layer" in str(table)


class _Net(nn.Module):
    """Registers its norm before the layer that it follows; ``kind`` says what lies between or beside them."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.conv, self.kind = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), kind
        self.between = {"inplace": nn.ReLU(inplace=True), "dropout": nn.Dropout(0.3), "pool": nn.MaxPool2d(1)}.get(kind)

    def forward(self, x):
        y = self.conv(x)
        if self.between is not None:
            y = self.between(y)
        out = self.norm(y)
        if self.kind == "beside":
            out = out + y
        if self.kind == "shared":
            out = self.conv(out.relu())
        if self.kind == "twice":
            out = self.norm(self.conv(out.relu()))
        return out


@pytest.mark.parametrize(
    ("kind", "folds"),
    [
        ("direct", True),
        ("dropout", True),
        ("twice", True),
        ("inplace", False),
        ("pool", False),
        ("beside", False),
        ("shared", False),
    ],
)
def test_a_norm_folds_if_it_alone_reads_the_output_as_it_is(kind, folds):
    table = audit(disturb(_Net(kind)), folded=True)
    assert [row.norms for row in table] == [("norm",) if folds else ()] * (2 if kind in ("shared", "twice") else 1)
    assert table.unfolded == ([] if folds else ["norm"])


def test_a_layer_that_does_not_run_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    table = audit(Net(), folded=True)
    assert [row.name for row in table] == ["used"]
    assert table.skipped == ["spare"]


def test_the_model_is_only_read():
    model = classifier("ResNet_CIFAR", 512, depth=18).train()
    model.backbone.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    audit(model, folded=True, inputs=torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("variant", [None, "ws", "fro"])
def test_the_maps_bound_the_gbr_of_a_network_with_batch_norms(variant):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    )
    if variant:
        to_enc(model, variant=variant)
    disturb(model).eval()
    x = torch.randn(6, 3, 8, 8)
    table = audit(model, folded=True, inputs=x)
    assert gbr(model, x).max().item() <= table.map_chain["product"]
    assert table.map_slack >= 0
    assert table.kernel_chain == bound_chain(row.sq_norm for row in table)
    assert "AM-GM slack" in str(table)
    assert f"{table.map_slack:.4g} (linear maps)" in str(table)


def test_a_layer_counts_in_the_bound_as_often_as_it_runs_with_the_input_sizes_of_its_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False).double()
            self.head = nn.Linear(3 * 9, 2, bias=False).double()

        def forward(self, x):
            return self.head(self.conv(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 12, 12, dtype=torch.float64)
    model.conv.weight.data.mul_(100)
    table = audit(model, folded=True, inputs=x)
    maps = [conv_map_sq_norm(model.conv.weight, (side, side), stride=2, padding=1).item() for side in (12, 6)]
    head = model.head.weight.square().sum().item()
    assert [row.name for row in table] == ["conv", "conv (call 2)", "head"]
    assert [row.map_sq_norm for row in table] == pytest.approx([*maps, head])
    assert table.map_chain["product"] == pytest.approx(maps[0] * maps[1] * head)
    assert maps[0] * head < gbr(model, x).max().item() <= table.map_chain["product"]


def test_weights_of_other_modules_are_named_because_the_chains_leave_them_out():
    frozen = FrozenBatchNorm2d(2)  # its weight is a buffer
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.GroupNorm(2, 2), frozen, nn.ReLU()
    )
    table = audit(model, folded=True)
    assert table.others == {
        "2": "ConvTranspose2d has no ENC layer",
        "3": "GroupNorm is no layer or batch norm",
        "4": "FrozenBatchNorm2d is no layer or batch norm",
    }
    assert "3 weights of other modules are left out: 2, 3, 4" in str(table)


def test_class_weights_of_a_loss_are_no_part_of_the_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(2))

        def forward(self, x):
            return self.head(x)

    assert audit(Net(), folded=True, inputs=torch.randn(2, 4)).others == {}


def test_slack_is_zero_for_equal_norms_and_grows_with_the_gains():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    to_enc(model, post_norm=False)
    assert audit(model, folded=True).slack == pytest.approx(0, abs=1e-5)
    model[1].weight.data.fill_(10)
    # Squared norms 100 and 1: log(50.5^2) - log(100).
    assert audit(model, folded=True).slack == pytest.approx(3.239, abs=1e-3)


def test_positions_of_a_token_network_count_in_its_map():
    model = nn.Linear(3, 2, bias=False).double()
    (row,) = audit(model, folded=True, inputs=torch.randn(2, 7, 3, dtype=torch.float64))
    assert row.map_sq_norm == pytest.approx(7 * row.sq_norm)
    assert gbr(model, torch.randn(2, 7, 3, dtype=torch.float64))[0].item() == pytest.approx(row.map_sq_norm)


def test_a_network_that_takes_no_made_up_input_asks_for_a_batch():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 49, 4))
    with pytest.raises(ValueError, match="does not run on a generated input of shape .*pass an input batch"):
        audit(model, folded=True)
    assert len(audit(model, folded=True, inputs=torch.randn(1, 3, 9, 9))) == 2
