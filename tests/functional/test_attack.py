from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from enc_plugin.datasets import Digits
from enc_plugin.functional import fgsm, pgd
from enc_plugin.functional.attack import input_gradient

EPS = [1 / 255, 8 / 255, 16 / 255, 64 / 255]


def linear(weight: list[list[float]]) -> nn.Module:
    model = nn.Linear(len(weight[0]), len(weight), bias=False).double().eval()
    model.weight.data = torch.tensor(weight, dtype=torch.float64)
    return model


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network trained on the digits, whose normalisation is its first layer, and the test images in 0..1."""
    torch.manual_seed(0)

    def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        samples = Digits(split).load_data_list()
        pixels = np.stack([sample["img"][..., :1] for sample in samples]).transpose(0, 3, 1, 2)
        return torch.from_numpy(pixels) / 255, torch.tensor([sample["gt_label"] for sample in samples])

    model = nn.Sequential(
        nn.BatchNorm2d(1, affine=False),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(512, 10),
    )
    images, labels = tensors("train")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
    images, labels = tensors("test")
    assert accuracy(model, images, labels) > 0.95
    return model, images, labels


def power_of_two(digits):
    """256 images: peers average the loss over the batch, which scales gradients exactly then."""
    model, images, labels = digits
    return model, images[:256], labels[:256]


def in_float64(given):
    """In float64, rounding decides the sign of no gradient."""
    model, images, labels = given
    return copy.deepcopy(model).double(), images.double(), labels


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(images).argmax(1) == labels).double().mean().item()


def test_linear_two_class_model_moves_along_the_sign_of_the_weight_difference():
    weight = torch.tensor([[1.0, -2.0, 0.5], [3.0, -5.0, 0.5]], dtype=torch.float64)
    images = torch.full((2, 3), 0.5, dtype=torch.float64)
    # Loss of class y rises along w_other - w_y = +-(2, -3, 0): the third pixel has no influence and stays.
    expected = torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.6, 0.5]], dtype=torch.float64)
    adversarial = fgsm(linear(weight.tolist()), images, torch.tensor([0, 1]), 0.1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=0)


def test_linear_model_gradient_has_its_closed_form():
    weight = torch.randn(4, 6, dtype=torch.float64)
    images, labels = torch.rand(5, 6, dtype=torch.float64), torch.arange(5) % 4
    gradient, logits = input_gradient(linear(weight.tolist()), images, labels)
    shares = torch.softmax(images @ weight.T, 1)
    residual = shares - F.one_hot(labels, 4)  # d loss / d logits
    torch.testing.assert_close(logits, images @ weight.T)
    torch.testing.assert_close(gradient, residual @ weight / (1 - shares.gather(1, labels[:, None])))


@pytest.mark.parametrize("margin", [5, 30])
def test_confident_predictions_are_attacked_as_in_float64(margin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5)).eval()
    images = torch.rand(64, 20)
    top = model(images).topk(2)
    model[2].weight.data *= (s := margin / (top.values[:, 0] - top.values[:, 1]).max())
    model[2].bias.data *= s
    exact, x = copy.deepcopy(model).double(), images.double().requires_grad_()
    F.cross_entropy(exact(x), top.indices[:, 0], reduction="sum").backward()
    found = fgsm(model, images, top.indices[:, 0], 0.1, lower=-1, upper=2)
    assert ((found - images).sign() == x.grad.sign()).double().mean() > 0.999


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_softmax_that_is_saturated_does_not_stop_an_attack(attack):
    images, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    expected = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    torch.testing.assert_close(attack(lambda x: 1e4 * x, images, labels, 0.1), expected)


def test_pgd_reaches_the_worst_corner_of_a_linear_two_class_model():
    model, labels = linear([[1.0, -2.0], [3.0, -5.0]]), torch.tensor([0, 1])
    images = torch.rand(2, 2, dtype=torch.float64)
    for start in (True, False):
        adversarial = pgd(model, images, labels, 0.1, steps=10, random_start=start)
        torch.testing.assert_close(adversarial, fgsm(model, images, labels, 0.1))


def test_pixel_without_gradient_stays():
    images = torch.rand(4, 3, 5, 5)
    adversarial = fgsm(lambda x: x[:, :1].flatten(1), images, torch.zeros(4, dtype=torch.long), 0.1)
    assert torch.equal(adversarial[:, 1:], images[:, 1:])
    assert not torch.equal(adversarial[:, :1], images[:, :1])


def test_nan_gradient_leaves_the_pixel():
    images = torch.rand(2, 3)
    assert torch.equal(fgsm(lambda x: x * float("nan"), images, torch.tensor([0, 1]), 0.1), images)


@pytest.mark.filterwarnings("ignore:eps. .* is below half a grey level")
@given(
    eps=st.floats(0, 1),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    bounds=st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_adversarial_images_stay_within_eps_and_the_bounds(eps, steps, seed, bounds, dtype):
    generator = torch.Generator().manual_seed(seed)
    lower, upper = bounds
    span = upper - lower
    images = lower + span * torch.rand(3, 4, generator=generator, dtype=dtype)
    images[0] = lower
    images[1] = upper
    weight = torch.randn(4, 5, generator=generator, dtype=dtype)

    def forward(x):
        return torch.tanh((x - lower) / span) @ weight

    labels = torch.randint(0, 5, (3,), generator=generator)
    both = dict(lower=lower, upper=upper)
    attacks = [
        fgsm(forward, images, labels, eps * span, **both),
        pgd(forward, images, labels, eps * span, steps=steps, **both),
    ]
    for adversarial in attacks:
        assert adversarial.dtype == dtype
        assert adversarial.shape == images.shape
        assert adversarial.min() >= lower
        assert adversarial.max() <= upper
        assert (adversarial - images).abs().max() <= eps * span + 4 * torch.finfo(dtype).eps * span


@pytest.mark.parametrize("eps", [[0.3], [0.0, 0.1, 1.0, 0.1]])
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_sequence_of_eps_equals_single_attacks(attack, eps):
    weight, images, labels = torch.randn(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 1])
    many = attack(lambda x: x @ weight, images, labels, eps)
    assert isinstance(many, list)
    for budget, one in zip(eps, many, strict=True):
        assert torch.equal(one, attack(lambda x: x @ weight, images, labels, budget))


def test_any_number_of_eps_costs_one_gradient():
    calls = []

    def forward(x):
        calls.append(x)
        return x * 1

    fgsm(forward, torch.rand(2, 3), torch.tensor([0, 1]), [0.1, 0.2, 0.3])
    assert len(calls) == 1


def test_attack_of_an_image_does_not_depend_on_its_batch():
    torch.manual_seed(1)
    model = linear(torch.randn(4, 6).tolist())
    images, labels = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    gradient, _ = input_gradient(model, images, labels)
    alone, _ = input_gradient(model, images[2:3], labels[2:3])
    torch.testing.assert_close(gradient[2:3], alone, rtol=1e-12, atol=0)


def test_normalised_and_pixel_units_give_the_same_attack(digits):
    model, images, labels = digits
    in_unit = fgsm(model, images, labels, 8 / 255)
    in_pixels = fgsm(lambda x: model(x / 255), images * 255, labels, 8.0, upper=255.0)
    assert (in_pixels / 255 - in_unit).abs().max() < 1e-6


def test_pgd_is_at_least_as_strong_as_fgsm(digits):
    model, images, labels = digits
    for eps in (16 / 255, 64 / 255):
        weak = accuracy(model, fgsm(model, images, labels, eps), labels)
        strong = accuracy(model, pgd(model, images, labels, eps), labels)
        assert strong <= weak < accuracy(model, images, labels)


def test_fgsm_agrees_with_torchattacks(digits):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (requirements/peers.txt)")
    model, images, labels = in_float64(power_of_two(digits))
    for eps, ours in zip(EPS, fgsm(model, images, labels, EPS), strict=True):
        theirs = torchattacks.FGSM(model, eps=eps)(images, labels)
        assert (ours - theirs).abs().max() < 1e-5
        assert accuracy(model, ours, labels) == accuracy(model, theirs, labels)


def test_pgd_agrees_with_torchattacks(digits):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (requirements/peers.txt)")
    model, images, labels = in_float64(power_of_two(digits))
    for eps, ours in zip(EPS, pgd(model, images, labels, EPS, steps=5, random_start=False), strict=True):
        theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 2, steps=5, random_start=False)(images, labels)
        assert (ours - theirs).abs().max() < 1e-5
        assert accuracy(model, ours, labels) == accuracy(model, theirs, labels)


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether float32 images are the same but for pixels with a gradient of nearly zero, whose sign is rounding."""
    return ((ours - theirs).abs() > 1e-5).double().mean().item() < 1e-3


def test_fgsm_and_pgd_agree_with_the_adversarial_robustness_toolbox(digits):
    reason = "adversarial-robustness-toolbox is not installed (requirements/peers.txt)"
    evasion = pytest.importorskip("art.attacks.evasion", reason=reason)
    from art.estimators.classification import PyTorchClassifier

    model, images, labels = power_of_two(digits)
    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    plain = dict(batch_size=512)
    iterated = pgd(model, images, labels, EPS, steps=5, random_start=False)
    for eps, *ours in zip(EPS, fgsm(model, images, labels, EPS), iterated, strict=True):
        attacks = [
            evasion.FastGradientMethod(estimator, eps=eps, **plain),
            evasion.ProjectedGradientDescent(estimator, eps=eps, eps_step=eps / 2, max_iter=5, verbose=False, **plain),
        ]
        for own, attack in zip(ours, attacks, strict=True):
            theirs = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
            assert agree(own, theirs)
            assert accuracy(model, own, labels) == accuracy(model, theirs, labels)


def test_attacks_leave_no_trace(digits):
    model, images, labels = digits
    model.zero_grad()  # the toolbox leaves gradients behind
    parameter, *others = model.parameters()
    parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = images.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad():
        fgsm(model, images, labels, 0.1)
        pgd(model, images, labels, 0.1, steps=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(other.grad is None for other in others)
    assert torch.equal(images, kept)
    assert not images.requires_grad
    assert not any(module.training for module in model.modules())
    parameter.grad = None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(mode, digits):
    model, images, labels = digits
    expected = fgsm(model, images[:8], labels[:8], 0.1)
    with mode():
        found = fgsm(model, images[:8] + 0, labels[:8] + 0, 0.1)
    assert torch.equal(found, expected)


def test_gradients_of_confident_predictions_do_not_underflow_in_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    model[2].weight.data *= 400
    images = torch.rand(32, 20)
    labels = model(images).argmax(1)
    expected = fgsm(model, images, labels, 0.1)
    with torch.autocast("cpu", torch.float16):
        found = fgsm(model, images, labels, 0.1)
        half = fgsm(model, images.half(), labels, 0.1)  # the network cannot read these without autocast
    assert torch.equal(found, expected)
    assert half.dtype == torch.float16
    assert not (half == images.half()).all(1).any()


def test_half_precision_logits_do_not_flush_the_gradient_to_zero(digits):
    model, images, labels = digits

    def in_half_precision(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    gradient, logits = input_gradient(in_half_precision, images, labels)
    adversarial = fgsm(in_half_precision, images, labels, 64 / 255)
    assert logits.dtype == torch.bfloat16
    assert gradient.dtype == adversarial.dtype == torch.float32
    full, _ = input_gradient(model, images, labels)
    assert (gradient.flatten(1).abs().amax(1) == 0).sum() == (full.flatten(1).abs().amax(1) == 0).sum()
    assert accuracy(model, adversarial, labels) < 0.9


def test_random_start_comes_from_the_generator_that_is_given():
    weight, images, labels = torch.randn(6, 3), torch.rand(4, 6), torch.zeros(4, dtype=torch.long)

    def attack(generator):
        # A step far smaller than eps keeps the starting point visible.
        return pgd(lambda x: x @ weight, images, labels, 0.1, steps=1, step_size=1e-6, generator=generator)

    assert torch.equal(attack(None), attack(None))
    assert not torch.equal(attack(None), attack(torch.Generator().manual_seed(5)))
    state = torch.get_rng_state()
    attack(torch.default_generator)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_network_that_begins_in_place_is_attacked_and_its_images_stay(attack):
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.sub_(0.5).div_(0.25) @ weight.T

    images, labels = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    before = images.clone()
    expected = attack(lambda x: (x - 0.5) / 0.25 @ weight.T, images, labels, 0.1)
    assert torch.equal(attack(in_place, images, labels, 0.1), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_cross_entropy_of_one_logit_is_refused_and_its_own_loss_works(attack):
    images, labels = torch.full((2, 2), 0.5), torch.tensor([0, 1])
    net = linear([[1.0, -1.0]]).float()
    with pytest.raises(ValueError, match="expected at least 2 logits, got 1, .* pass a loss of one logit"):
        attack(net, images, 0 * labels, 0.1)
    found = attack(net, images, labels, 0.1, loss=lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float()))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4], [0.4, 0.6]]))


def test_loss_may_be_a_callable():
    images, labels = torch.full((2, 3), 0.5), torch.tensor([0, 2])

    def margin(logits, labels):
        return -logits.gather(1, labels[:, None])[:, 0]

    expected = torch.tensor([[0.4, 0.5, 0.5], [0.5, 0.5, 0.4]])
    torch.testing.assert_close(fgsm(lambda x: x * 1, images, labels, 0.1, loss=margin), expected)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.5)])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)])
def test_train_mode_is_refused(attack, layer, wrap):
    model = nn.Sequential(nn.Linear(3, 3), layer).eval()
    layer.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{type(layer).__name__}.* is in train mode; call model.eval"):
        attack(wrap(model), torch.rand(4, 3), torch.zeros(4, dtype=torch.long), 0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    layer.eval()
    attack(wrap(model), torch.rand(4, 3), torch.zeros(4, dtype=torch.long), 0.1)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_batch_norm_without_running_statistics_is_refused(attack):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="BatchNorm1d keeps no running statistics"):
        attack(model, torch.rand(4, 3), torch.zeros(4, dtype=torch.long), 0.1)


def test_images_outside_the_bounds_are_refused():
    with pytest.raises(ValueError, match=r"pixels within \[0, 1\], got \[-2, 2\].*normalise them in forward"):
        fgsm(lambda x: x, torch.tensor([[-2.0, 2.0]]), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="pixels within"):
        fgsm(lambda x: x, torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]), 0.1)


def test_rounding_of_a_normalisation_that_was_undone_is_within_the_bounds():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (torch.arange(256.0)[:, None] / 255 - mean) / std * std + mean
    images[0] -= 1e-7
    images[-1] += 2e-7
    adversarial = fgsm(lambda x: x, images, torch.zeros(256, dtype=torch.long), 0.1)
    assert (adversarial.min(), adversarial.max()) == (0, 1)
    with pytest.raises(ValueError, match="pixels within"):
        fgsm(lambda x: x, images + 1e-5, torch.zeros(256, dtype=torch.long), 0.1)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(
    ("forward", "loss"),
    [(torch.round, "cross_entropy"), (lambda x: 1000 * x, functools.partial(F.cross_entropy, reduction="sum"))],
)
def test_gradients_that_are_zero_for_all_images_are_warned_of(attack, forward, loss):
    images, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="exactly 0.*not mean that the network is robust.*rounding"):
        adversarial = attack(forward, images, labels, 0.1, loss=loss)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("eps", [8, -0.1, [0.1, 2.0], float("nan")])
def test_eps_outside_the_range_of_pixels_is_refused(eps):
    with pytest.raises(ValueError, match="eps: expected numbers from 0 to upper - lower = 1, got"):
        fgsm(lambda x: x, torch.rand(1, 2), torch.tensor([0]), eps)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_labels_may_be_any_integers_and_eps_a_tensor_without_dimensions(attack):
    weight, images, labels = torch.randn(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 1])
    expected = attack(lambda x: x @ weight, images, labels, 0.25)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(attack(lambda x: x @ weight, images, labels.to(dtype), 0.25), expected)
    for eps in (torch.tensor(0.25), np.array(0.25)):
        assert torch.equal(attack(lambda x: x @ weight, images, labels, eps), expected)


def test_wrong_arguments_are_named():
    images, labels = torch.rand(2, 3), torch.tensor([0, 1])

    def forward(x):
        return x * 1

    with pytest.raises(TypeError, match="images: expected floating point, got torch.uint8"):
        fgsm(forward, images.byte(), labels, 0.1)
    with pytest.raises(ValueError, match="labels: expected 2 class numbers"):
        fgsm(forward, images, labels[:1], 0.1)
    with pytest.raises(ValueError, match="lower < upper"):
        fgsm(forward, images, labels, 0.1, lower=1, upper=0)
    with pytest.raises(ValueError, match="loss: expected 'cross_entropy' or a callable"):
        fgsm(forward, images, labels, 0.1, loss="hinge")
    with pytest.raises(ValueError, match="forward: expected logits of shape"):
        fgsm(lambda x: x.sum(1), images, labels, 0.1)
    with pytest.raises(ValueError, match="does not depend on the input"):
        fgsm(lambda x: x.detach(), images, labels, 0.1)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        pgd(forward, images, labels, 0.1, steps=0)
    with pytest.raises(ValueError, match="step_size: expected a positive"):
        pgd(forward, images, labels, 0.1, step_size=0)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_eps_below_half_a_grey_level_is_warned_of_with_the_value_that_may_have_been_meant(attack, recwarn):
    images, labels = torch.rand(2, 3) * 255, torch.tensor([0, 1])
    attack(lambda x: x, images, labels, [0, 0.5, 1, 8], upper=255)
    attack(lambda x: x, images / 255, labels, 8 / 255)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"eps: 0.03137 is below half a grey level.*use eps=8$"):
        attack(lambda x: x, images, labels, [8 / 255, 1], upper=255)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_method_of_a_module_in_train_mode_is_refused(attack):
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear is in train mode"):
        attack(functools.partial(net.forward), torch.rand(1, 2), torch.tensor([0]), 0.1)
