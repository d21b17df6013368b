"""Surgery on whole models: what is converted, what gets a batch norm, what is refused."""

from __future__ import annotations

import ast
import copy

import pytest
import timm
import torch
import torchvision
from helpers import NEW_TIMM
from mmengine.hub import get_config
from mmpretrain.registry import MODELS
from torch import nn

from enc_plugin import ENCConv2d, ENCLinear, NoEffectWarning, audit, fold, to_enc
from enc_plugin.convert import enc_layers
from enc_plugin.functional import enc_weight


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def stock_classifier(config: str, **backbone) -> nn.Module:
    cfg = get_config(f"mmpretrain::{config}").model
    cfg.backbone.update(backbone)
    return MODELS.build(cfg)


# Layers as counted by hand from the architectures: convolutions + classifier; post-norms: classifier + SE convolutions.
@pytest.mark.parametrize(
    ("config", "layers", "post_norms"),
    [
        ("resnet/resnet18_8xb16_cifar10.py", 17 + 3 + 1, 1),
        ("seresnet/seresnet50_8xb32_in1k.py", 53 + 32 + 1, 33),
        ("resnext/resnext50-32x4d_8xb32_in1k.py", 53 + 1, 1),
        ("densenet/densenet121_4xb256_in1k.py", 120 + 1, 1),
    ],
)
def test_mmpretrain_models_are_converted_whole(config, layers, post_norms):
    model = stock_classifier(config)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    report = to_enc(model)
    assert (len(report), report.num_post_norms, report.skipped) == (layers, post_norms, {})
    assert all(any(p is q for q in model.parameters()) for p in parameters), "parameters are kept"
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in values.items()), "values and keys are kept"
    added = {key.split(".norm.")[-1].split(".")[-1] for key in after.keys() - values.keys()}
    assert added == {*nn.BatchNorm2d(1).state_dict(), "_extra_state"}
    assert audit(model).max_deviation < 1e-5


def test_post_norms_go_to_the_classifier_and_the_squeeze_excitation_layers():
    report = to_enc(stock_classifier("seresnet/seresnet50_8xb32_in1k.py").to("meta"))
    with_norm = [layer.name for layer in report.layers if layer.post_norm]
    assert all(".se_layer.conv" in name for name in with_norm[:-1])
    assert with_norm[-1] == "head.fc"


@pytest.mark.parametrize("name", ["seresnet18", "resnet18", "regnety_002", "efficientnet_b0"])
def test_timm_models_are_converted_whole(name):
    model = timm.create_model(name, num_classes=7)
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    in_se = [m for b in model.modules() if type(b).__name__.startswith(("SE", "Squeeze")) for m in b.modules()]
    expected = sum(isinstance(m, nn.Linear) for m in convs) + sum(isinstance(m, nn.Conv2d) for m in in_se)
    report = to_enc(model, variant="wn")
    assert (len(report), report.num_post_norms) == (len(convs), expected)
    assert model.eval()(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_torchvision_squeeze_excitation_gets_post_norms():
    with torch.device("meta"):
        report = to_enc(torchvision.models.mobilenet_v3_small(num_classes=5), variant="wn")
    with_norm = {layer.name.rsplit(".", 1)[1] for layer in report.layers if layer.post_norm}
    assert with_norm == {"fc1", "fc2", "0", "3"}  # of SqueezeExcitation, and the two linear layers of the classifier


def test_a_linear_layer_that_a_batch_norm_follows_gets_no_second_one():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    report = to_enc(model)
    assert [layer.post_norm for layer in report.layers] == [False, True]


def test_batch_norms_of_blocks_count_too():
    head = MODELS.build(
        dict(type="StackedLinearClsHead", num_classes=5, in_channels=8, mid_channels=[8], norm_cfg=dict(type="BN1d"))
    )
    assert [layer.post_norm for layer in to_enc(head).layers] == [False, True]
    levit = timm.create_model("levit_128s", num_classes=5)
    blocks = {name for name, module in levit.named_modules() if type(module).__name__ == "LinearNorm"}
    with_norm = {layer.name for layer in to_enc(levit).layers if layer.post_norm}
    assert blocks
    assert not {name for name in with_norm if name.rsplit(".", 1)[0] in blocks}


@pytest.mark.parametrize(
    ("post_norm", "expected"), [(True, [True, True]), (False, [False, False]), ("auto", [False, True])]
)
def test_post_norm_option_gives_every_layer_or_none_a_batch_norm(post_norm, expected):
    report = to_enc(small_net(), post_norm=post_norm)
    assert [layer.post_norm for layer in report.layers] == expected


def test_modules_keep_identity_hooks_and_references():
    model = small_net()
    conv, seen = model[0], []
    conv.register_forward_hook(lambda *_: seen.append(1))
    to_enc(model)
    assert model[0] is conv
    assert type(conv) is ENCConv2d
    model(torch.randn(2, 3, 8, 8))
    assert seen == [1]


def test_conversion_draws_no_random_numbers():
    model = small_net()
    state = torch.get_rng_state()
    to_enc(model, post_norm=True, alpha="learnable")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_layer_is_a_model_too():
    layer = nn.Linear(4, 3)
    report = to_enc(layer)
    assert type(layer) is ENCLinear
    assert [x.name for x in report.layers] == [""]


def test_a_shared_layer_is_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(to_enc(model)) == 1


def test_include_and_exclude_take_names_and_globs():
    def names(**kwargs):
        with torch.device("meta"):
            return [x.name for x in to_enc(torchvision.models.resnet18(), **kwargs).layers]

    assert names(include="fc") == ["fc"]
    assert names(include=["layer1", "conv1"])[:2] == ["conv1", "layer1.0.conv1"]
    assert all("downsample" in name for name in names(include="*.downsample.*"))
    assert "fc" not in names(exclude=["fc"])
    assert len(names(exclude=["layer?.?.conv1"])) == 21 - 8


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_is_an_error_that_shows_the_layers(argument):
    with pytest.raises(ValueError, match=rf"{argument}: 'head' matches no layer; the layers are '0', '5'"):
        to_enc(small_net(), **{argument: ["head"]})


def test_nothing_to_convert_is_a_warning():
    with pytest.warns(NoEffectWarning, match="to_enc changed nothing: ReLU has no Conv1d/2d/3d or Linear layer"):
        report = to_enc(nn.ReLU())
    assert len(report) == 0


def test_converting_twice_with_the_same_options_changes_nothing():
    model = small_net()
    to_enc(model)
    state = copy.deepcopy(model.state_dict())
    report = to_enc(model)
    assert (len(report), report.num_post_norms) == (2, 1)
    assert model.state_dict().keys() == state.keys()


def test_converting_twice_with_other_options_is_an_error():
    model = small_net()
    to_enc(model)
    with pytest.raises(
        ValueError,
        match="already ENC with variant='ws', alpha=1.0, but .* with variant='wn'",
    ):
        to_enc(model, variant="wn")


@pytest.mark.parametrize(
    ("break_it", "variant", "message"),
    [
        (lambda m: m[0].weight.data[1].fill_(0.3), "ws", "layer '0': 1 of its 8 rows are constant.*exclude=\\['0'\\]"),
        (lambda m: m[5].weight.data.fill_(1.0), "centered_fro", "layer '5': its weight is constant"),
        (lambda m: m[5].weight.data[2].zero_(), "wn", "layer '5': 1 of its 10 rows are all zero"),
        (lambda m: m[5].weight.data.zero_(), "fro", "layer '5': its weight is all zero"),
        (lambda m: m[0].weight.data[0, 0, 0, 0].fill_(float("nan")), "fro", "layer '0': its weight holds NaN or Inf"),
    ],
)
def test_a_layer_without_a_direction_is_refused_and_the_model_left_alone(break_it, variant, message):
    model = small_net()
    break_it(model)
    with pytest.raises(ValueError, match=message):
        to_enc(model, variant=variant)
    assert not list(enc_layers(model))


@pytest.mark.parametrize(
    ("make", "variant", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 1, groups=4), "ws", "rows of one element.*0 / 0; convert it with variant='fro'"),
        (
            lambda: nn.Conv2d(4, 4, 1, groups=4),
            "wn",
            "rows of one element.*signs, which cannot.*variant='fro'",
        ),
        (lambda: nn.Linear(2, 16), "ws", "rows of 2 elements.*signs, which cannot be trained.*variant='wn'"),
        (lambda: nn.Conv1d(2, 4, 1), "ws", "rows of 2 elements.*signs, which cannot be trained"),
        (lambda: nn.Linear(2, 1), "centered_fro", "rows of 2 elements.*signs, which cannot be trained.*variant='wn'"),
        (
            lambda: nn.Linear(1, 1),
            "fro",
            "rows of one element.*signs, which cannot.*no variant can train it",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_that_become_mere_signs_are_refused_with_the_way_out(make, variant, message, device):
    with torch.device(device):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), make())
    with pytest.raises(ValueError, match=f"layer '1': .*{message}.*exclude="):
        to_enc(model, variant)
    assert not list(enc_layers(model)), "a refused model is left alone"


def test_all_layers_that_cannot_be_normalised_are_named_at_once_with_patterns_that_leave_them_out():
    def block():
        return nn.ModuleDict(dict(tap=nn.Conv2d(8, 8, 1, groups=8), conv=nn.Conv2d(8, 8, 3), norm=nn.BatchNorm2d(8)))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8), *(block() for _ in range(12)))
    with pytest.raises(ValueError, match="13 layers cannot be ENC layers.*layer '1': shape") as refused:
        to_enc(model)
    assert not list(enc_layers(model))
    exclude = ast.literal_eval(str(refused.value).rpartition("exclude=")[2])
    assert exclude == ["1", "*.tap"]
    report = to_enc(model, exclude=exclude)
    assert {layer.name for layer in report.layers} == {"0", *(f"{i}.conv" for i in range(2, 14))}


@pytest.mark.parametrize(
    ("shape", "variant"), [((3, 2), "ws"), ((3, 1), "wn"), ((1, 2), "centered_fro"), ((1, 1), "fro")]
)
def test_refused_rows_cannot_train_because_their_effective_weight_is_locally_constant(shape, variant):
    weight, direction = torch.randn(2, *shape, dtype=torch.float64)
    forward, backward = (enc_weight(weight + h * direction, variant) for h in (1e-5, -1e-5))
    assert (forward - backward).abs().max() < 1e-12
    longer = torch.randn(shape[0], shape[1] + 1, dtype=torch.float64)
    assert (enc_weight(longer, variant) - enc_weight(longer + 1e-5 * longer.roll(1, 1), variant)).abs().max() > 1e-7


def test_the_layer_that_cannot_take_the_variant_takes_another_one():
    model = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    to_enc(model, exclude="0")
    to_enc(model, "wn", include="0")
    assert [layer.variant for _, layer in enc_layers(model)] == ["wn", "ws"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(variant="eq22"), "variant: expected one of"),
        (dict(alpha=0.0), "alpha: expected a positive"),
        (dict(alpha="auto"), "alpha: expected a positive finite number or 'learnable'"),
        (dict(post_norm="always"), "post_norm: expected 'auto', True or False, got 'always'"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        to_enc(small_net(), **kwargs)


def test_a_printed_report_is_one_line_and_its_table_on_request():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    report = to_enc(model, alpha=2.0)
    assert str(report) == repr(report) == "2 ENC layers (ws, alpha 2.0), 1 with an added batch norm"
    assert len(report.table.splitlines()) > 2


def test_weights_without_an_enc_layer_are_reported_as_plain():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "fc": nn.Linear(4, 2), "up": nn.ConvTranspose2d(2, 2, 2)})
    report = to_enc(model)
    assert report.skipped == {"embed": "Embedding has no ENC layer", "up": "ConvTranspose2d has no ENC layer"}
    assert "plain: embed (Embedding has no ENC layer)" in report.table


def test_meta_models_are_converted():
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    assert len(to_enc(model)) == 54


def test_audit_reads_norms_and_finds_the_layer_that_lost_its_direction():
    model = small_net()
    to_enc(model, alpha=2.0)
    table = audit(model)
    assert [row.name for row in table] == ["0", "5"]
    assert table[0].free_norm == pytest.approx(model[0].weight.norm().item(), rel=1e-6)
    assert all(row.sq_norm == pytest.approx(2.0, rel=1e-6) for row in table)
    assert table.max_deviation < 1e-6
    assert "largest deviation from alpha" in str(table)
    model[5].weight.data[0].fill_(0.0)
    assert torch.tensor(audit(model).max_deviation).isnan()


def test_audit_of_a_plain_model_is_empty():
    assert (list(audit(small_net())), audit(small_net()).max_deviation) == ([], 0.0)


class Helper(nn.Module):
    """One kernel at two dilations, read in a helper method; called nowhere."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def branch(self, x, dilation):
        weight = getattr(self.proj, "weight").detach() if dilation == 1 else self.proj.weight  # noqa: B009
        return nn.functional.conv2d(x, weight, self.proj.bias, padding=dilation, dilation=dilation)

    def forward(self, x):
        return self.fc(self.norm(self.branch(x, 1) + self.branch(x, 2)).mean((2, 3)))


class TiedDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 5)]), nn.BatchNorm1d(5)

    def forward(self, x):
        first, second = self.layers
        code = self.norm(second(first(x)))
        return nn.functional.linear(code, first.weight.flatten(0).view(5, 6).t())


@pytest.mark.parametrize(("make", "name"), [(Helper, "proj"), (TiedDecoder, "layers.0")])
def test_a_weight_that_others_compute_with_stays_plain_and_fold_keeps_the_function(make, name):
    model, x = make().eval(), torch.randn(4, 6) if make is TiedDecoder else torch.randn(2, 3, 9, 9)
    report = to_enc(model, "wn")
    assert report.skipped == {name: f"{make.__name__} reads its weight without calling it"}
    assert len(report) == 1
    torch.testing.assert_close(fold(model)(x), model(x))


def test_an_enc_layer_whose_free_weight_others_read_is_refused_with_the_way_out():
    model = Helper()
    model.proj = ENCConv2d(3, 8, 3)
    message = r"layer 'proj'.* is (already )?ENC.*Helper reads its weight without calling it.*free weight"
    with pytest.raises(ValueError, match=message):
        to_enc(model)
    with pytest.raises(ValueError, match=message + r".*exclude=\['proj'\]"):
        fold(model)


class OutOfOrder(nn.Module):
    """Batch norms of one width: the first reads the second layer, the second nothing linear."""

    def __init__(self):
        super().__init__()
        self.norm_b, self.a, self.norm_c, self.b = (
            nn.BatchNorm1d(6),
            nn.Linear(6, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 6),
        )

    def forward(self, x):
        return self.norm_b(self.b(self.norm_c(self.a(x).relu())))


def test_the_batch_norm_that_reads_a_layer_counts_and_not_the_one_that_was_registered_behind_it():
    report = to_enc(OutOfOrder())
    assert {layer.name: layer.post_norm for layer in report.layers} == {"a": True, "b": False}


def test_a_norm_inside_a_squeeze_excitation_block_is_enough():
    report = to_enc(timm.layers.SEModule(16, rd_channels=8, norm_layer=nn.BatchNorm2d))
    assert {layer.name: layer.post_norm for layer in report.layers} == {"fc1": False, "fc2": True}


def test_squeeze_excitation_is_known_by_what_it_does():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = self.norm(self.body(x))
            return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    report = to_enc(Gate())
    assert {layer.name: layer.post_norm for layer in report.layers} == {"body": False, "down": True, "up": True}
    assert report.without_norm == []


@pytest.mark.parametrize("name", ["resnetv2_50", "dla34", "dpn48b"])
def test_a_classifier_that_is_a_convolution_gets_a_norm(name):
    if name == "resnetv2_50" and not NEW_TIMM:
        pytest.skip("this version of timm cannot build it without values")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    report = to_enc(model)
    classifier = model.get_classifier()
    assert [layer.name for layer in report.layers if layer.post_norm] == [
        name for name, module in model.named_modules() if module is classifier
    ]
    assert report.without_norm == []


def test_a_classifier_in_front_of_the_last_pooling_gets_a_norm():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert to_enc(model, "wn").num_post_norms == 1
    dense = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
    with pytest.warns(UserWarning, match="1 of 2 ENC layers have no norm after them.*: 2\\. "):
        assert to_enc(dense).num_post_norms == 0


def test_a_network_without_norms_is_warned_of_with_count_and_names():
    with torch.device("meta"):
        model = torchvision.models.vgg11(num_classes=4)
    with pytest.warns(UserWarning, match=r"7 of 11 ENC layers .*: features.0, .*, \.\.\..*post_norm=True") as said:
        report = to_enc(model)
    assert len(said) == 1
    assert report.without_norm == [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16)]
    assert "without a norm after them: features.0, features.3" in report.table


@pytest.mark.parametrize(("name", "kwargs"), [("vgg11_bn", {}), ("densenet121", {}), ("vgg11", dict(post_norm=True))])
def test_nobody_is_warned_where_norms_restore_the_scale_or_none_were_wanted(name, kwargs, recwarn):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=4)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert to_enc(model, **kwargs).without_norm == []
    assert to_enc(plain, post_norm=False).without_norm == ["0", "2"]
    assert not [warning for warning in recwarn if "to_enc" in str(warning.message)]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 1))

    def forward(self, x, y):
        x = self.tower[:2](self.a(x) + self.b(y))
        return self.tower[2](x, x, x)[0]


def test_a_network_that_does_not_run_is_guessed_and_said_so_until_an_example_is_given():
    with pytest.warns(UserWarning, match=r"could not run the network \(TwoInputs does not run .*example=\.\.\."):
        report = to_enc(TwoInputs())
    assert list(report.guessed) == ["a", "b", "tower.0"]
    assert "guessed: a (the network did not run" in report.table
    report = to_enc(TwoInputs(), example=(torch.ones(2, 5), torch.ones(2, 3)))
    assert report.guessed == {}
    assert {layer.name: layer.post_norm for layer in report.layers} == {"a": True, "b": True, "tower.0": False}
    assert report.skipped["tower.2.out_proj"] == "MultiheadAttention reads its weight without calling it"
    with pytest.raises(ValueError, match=r"example: TwoInputs does not run on the example of shape \(2, 5\)"):
        to_enc(TwoInputs(), example=torch.ones(2, 5))


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.decoder.weight = self.embedding.weight

    def forward(self, batch):
        return self.decoder(self.embedding(batch["tokens"]))


@pytest.mark.parametrize("example", [None, (dict(tokens=torch.zeros(2, 3, dtype=torch.long)),)])
def test_a_decoder_that_is_tied_to_an_embedding_stays_plain_even_if_the_network_does_not_run(example):
    with pytest.warns(UserWarning, match="changed nothing"):
        report = to_enc(TiedToEmbedding(), example=example)
    assert report.skipped["decoder"] == "it shares its weight with Embedding"


def test_layers_that_run_in_train_mode_alone_are_seen_and_unused_ones_named():
    with torch.device("meta"):
        model = torchvision.models.googlenet(num_classes=4, init_weights=False)
        model.unused = nn.Linear(3, 2)
    report = to_enc(model)
    assert list(report.guessed) == ["unused"]
    assert {layer.name for layer in report.layers if layer.post_norm} == {
        *("fc", "aux1.fc1", "aux1.fc2", "aux2.fc1", "aux2.fc2", "unused")
    }


def test_a_layer_whose_forward_was_replaced_stays_plain():
    # As offloading and quantising tools do it (NVIDIA/Model-Optimizer pull request 824): the class has no say then.
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    first = model[0]
    first.forward = lambda x: nn.functional.linear(x, first.weight, first.bias)
    report = to_enc(model, "fro")
    assert report.skipped == {"0": "its forward was replaced on the instance"}
    assert [layer.name for layer in report.layers] == ["2"]
