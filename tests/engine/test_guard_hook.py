"""The guard lets healthy runs go on, and refuses before the first step what would fail late."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import build_runner, digits_config, train
from mmengine.registry import MODELS
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.models.losses import CrossEntropyLoss
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from enc_plugin.engine.preflight import number_of_classes
from enc_plugin.measuring.batches import check_batches, learns_nothing, norms_of_single_values
from enc_plugin.models import ResNetCIFAR6n


def refused(cfg, error=ValueError) -> str:
    runner = build_runner(cfg)
    with pytest.raises(error) as caught:
        runner.train()
    assert runner.iter == 0
    return str(caught.value)


class _Masking(nn.Module):
    def forward(self, x):
        return torch.full_like(x, -math.inf)


@MODELS.register_module()
class _WithConstants(ResNetCIFAR6n):
    """Tensors that are infinite, or NaN, on purpose: a mask, bounds that nothing has reached yet, a mark."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("min_val", torch.tensor(math.inf))
        self.register_buffer("unknown", torch.tensor(math.nan))
        self.register_buffer("spread", torch.zeros(()))
        self.fixed = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
        self.masking = _Masking()
        self.poison: float | None = None

    def forward(self, x):
        self.masking(x)
        if self.training:
            self.min_val.copy_(torch.minimum(self.min_val, x.detach().amin()))
            if self.poison is not None:
                self.spread.fill_(self.poison)
        return super().forward(x)


def test_tensors_that_are_infinite_on_purpose_stop_no_run(tmp_path):
    cfg = digits_config(tmp_path / "run", model__backbone__type="_WithConstants")
    runner = train(cfg)
    assert runner.epoch == 1
    assert runner.model.backbone.min_val.isfinite()
    again = digits_config(tmp_path / "again", model__backbone__type="_WithConstants")
    again.load_from = str(tmp_path / "run" / "epoch_1.pth")
    assert "accuracy/top1" in build_runner(again).test()


@pytest.mark.parametrize(("value", "stops"), [(math.inf, False), (math.nan, True)])
def test_of_other_buffers_nan_alone_is_divergence(tmp_path, value, stops):
    runner = build_runner(digits_config(tmp_path, model__backbone__type="_WithConstants"))
    runner.model.backbone.poison = value
    if stops:
        with pytest.raises(FloatingPointError, match="a weight or a running statistic is NaN"):
            runner.train()
    else:
        runner.train()


def test_the_layer_that_overflows_is_named_though_a_mask_is_infinite_before_it(tmp_path):
    runner = build_runner(digits_config(tmp_path, model__backbone__type="_WithConstants"))
    runner._init_model_weights = lambda: None
    norm = runner.model.backbone.layer2[0].bn1
    norm.weight.data[0] = norm.bias.data[0] = 3e38
    with pytest.raises(FloatingPointError, match=r"the first output that is not finite is .*'backbone\.layer2\.0"):
        runner.train()


SPLIT_ATTENTION = dict(type="mmpretrain.ResNeSt", depth=50, stem_channels=8, base_channels=8, reduction_factor=16)


@pytest.mark.parametrize("kind", ["ENCImageClassifier", "ImageClassifier"])
def test_a_last_batch_of_one_is_refused_where_any_batch_norm_gets_one_value(tmp_path, kind):
    """Split attention has a batch norm behind global pooling, in the stock network too."""
    cfg = digits_config(tmp_path, model__type=kind, train_dataloader__batch_size=16)
    cfg.model.backbone = SPLIT_ATTENTION
    cfg.model.head.in_channels = 256
    cfg.train_dataloader.dataset.indices = 33
    message = refused(cfg)
    assert "33 samples in batches of 16 leave a batch of one" in message
    assert "drop_last=True" in message


def test_a_last_batch_of_one_that_is_normalised_over_pixels_trains(tmp_path):
    cfg = digits_config(tmp_path, "resnet8_1xb64", train_dataloader__dataset__indices=65)
    assert train(cfg).iter == 2


def test_a_last_batch_that_is_never_reached_is_no_reason_to_refuse(tmp_path):
    cfg = digits_config(tmp_path, train_dataloader__dataset__indices=65)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=1, val_interval=1)
    cfg.param_scheduler = None
    assert train(cfg).iter == 1
    cfg.train_cfg.max_iters = 2
    cfg.work_dir += "_two"
    assert "leave a batch of one" in refused(cfg)


def test_endless_batches_of_one_are_refused(tmp_path):
    cfg = digits_config(tmp_path, train_dataloader__batch_size=1)
    cfg.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=True)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
    cfg.param_scheduler = None
    assert "a larger batch_size" in refused(cfg)


def test_looking_for_single_values_leaves_no_trace(tmp_path):
    runner = build_runner(digits_config(tmp_path))
    loader, model = runner.train_dataloader, runner.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    assert norms_of_single_values(loader, model) == ["head.fc.norm"]
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Stream(IterableDataset):
    def __iter__(self):
        yield from ()


def test_a_stream_of_samples_is_left_to_the_loop():
    check_batches(DataLoader(_Stream(), batch_size=1), nn.Linear(1, 1))


PENALTY = dict(model__gbr_penalty=dict(weight=1e-3))


@MODELS.register_module()
class _Recomputing(ResNetCIFAR6n):
    reentrant = True

    def forward(self, x):
        if self.training:
            x = checkpoint(torch.sin, x, use_reentrant=self.reentrant)
        return super().forward(x)


@MODELS.register_module()
class _RecomputingWithHooks(_Recomputing):
    reentrant = False


WATCHERS = {
    "save_best": lambda key: dict(default_hooks__checkpoint__save_best=key, default_hooks__checkpoint__rule="greater"),
    "EarlyStoppingHook": lambda key: dict(custom_hooks=[dict(type="EarlyStoppingHook", monitor=key, rule="greater")]),
    "ReduceOnPlateauLR": lambda key: dict(
        param_scheduler=dict(type="ReduceOnPlateauLR", monitor=key, rule="greater", patience=0)
    ),
}


class TestWatchers:
    """mmengine looks for what they watch after the first validation, and then stops or raises."""

    def config(self, tmp_path, watcher, key, interval=1):
        cfg = digits_config(tmp_path, epochs=2)
        options = WATCHERS[watcher](key)
        cfg.custom_hooks = [dict(type="FGSMHook", eps=8, interval=interval), *options.pop("custom_hooks", [])]
        cfg.param_scheduler = options.pop("param_scheduler", cfg.param_scheduler)
        cfg.merge_from_dict({key.replace("__", "."): value for key, value in options.items()})
        return cfg

    @pytest.mark.parametrize(
        ("watcher", "key", "interval", "message"),
        [
            ("save_best", "gbr/logits", 1, "it is logged, but is not a metric of the validation"),
            (
                "EarlyStoppingHook",
                "fgsm/top1_eps4",
                1,
                "would not be found, because FGSMHook logs 'fgsm/top1_clean', 'fgsm/top1_eps8'",
            ),
            ("ReduceOnPlateauLR", "fgsm/top1_eps8", 2, "with 2, FGSMHook skips validations"),
        ],
    )
    def test_a_scalar_that_will_be_missing_is_refused(self, tmp_path, watcher, key, interval, message):
        error = refused(self.config(tmp_path, watcher, key, interval))
        assert message in error
        assert watcher in error

    def test_a_name_that_the_evaluator_does_not_know_is_told_with_those_it_knows(self, tmp_path):
        with pytest.raises(ValueError, match=r"save_best: .* got 'accuracy/top2'; they are .*'accuracy/top1'"):
            train(self.config(tmp_path, "save_best", "accuracy/top2"))

    def test_a_scalar_of_each_attack_can_be_watched(self, tmp_path):
        assert train(self.config(tmp_path, "ReduceOnPlateauLR", "fgsm/top1_eps8")).epoch == 2


class TestPenalty:
    def test_compilation_is_refused_by_name(self, tmp_path):
        message = refused(digits_config(tmp_path, **PENALTY, compile=dict(backend="eager")))
        assert message.startswith("gbr_penalty: ")
        assert "torch.compile" in message

    @pytest.mark.parametrize("by", ["with_cp", "activation_checkpointing"])
    def test_activation_checkpointing_is_refused_by_name(self, tmp_path, by):
        cfg = digits_config(tmp_path, **PENALTY)
        if by == "with_cp":
            cfg.model.backbone.with_cp = True
        else:
            cfg.activation_checkpointing = ["backbone.layer1"]
        message = refused(cfg)
        assert message.startswith("gbr_penalty: ")
        assert by in message

    def test_recomputation_in_a_module_of_ones_own_is_refused(self, tmp_path):
        message = refused(digits_config(tmp_path, **PENALTY, model__backbone__type="_Recomputing"))
        assert message.startswith("gbr_penalty: ")
        assert "torch.utils.checkpoint" in message

    def test_recomputation_that_can_be_differentiated_trains(self, tmp_path):
        assert train(digits_config(tmp_path, **PENALTY, model__backbone__type="_RecomputingWithHooks")).iter == 3


class _OfColumn(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, logits, labels):
        return self.loss(logits[:, 0], labels.float())


class TestOneOutput:
    @pytest.mark.parametrize(("use_sigmoid", "nothing"), [(False, True), (True, False)])
    def test_softmax_of_one_output_learns_nothing_and_a_sigmoid_does(self, use_sigmoid, nothing):
        head = LinearClsHead(1, 4, loss=CrossEntropyLoss(use_sigmoid=use_sigmoid), topk=(1,))
        assert learns_nothing(head) == nothing

    def test_a_binary_output_and_a_real_number_are_no_classes(self):
        def classifier(loss: nn.Module) -> nn.Module:
            model = nn.Module()
            model.head = LinearClsHead(1, 4, topk=(1,))
            model.head.loss_module = loss
            return model

        assert number_of_classes(classifier(_OfColumn(lambda x, y: (x - y).square().mean()))) is None
        assert number_of_classes(classifier(_OfColumn(nn.functional.binary_cross_entropy_with_logits))) is None
        with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
            number_of_classes(classifier(CrossEntropyLoss()))
