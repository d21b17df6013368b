"""Float32 keeps its digits within a measurement, and the settings around it are as they were."""

from __future__ import annotations

import pytest
import torch

from enc_plugin.functional import fgsm, gbr
from enc_plugin.functional.precision import full_float32

NEW = hasattr(torch.backends, "fp32_precision")  # torch 2.9


def settings() -> dict[str, object]:
    """All that torch tells of the precision of float32."""
    backends = torch.backends
    found: dict[str, object] = {}
    for name, read in {
        "products": torch.get_float32_matmul_precision,
        "matmul.allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: backends.cudnn.allow_tf32,
    }.items():
        try:
            found[name] = read()
        except RuntimeError:  # contradicted by the newer settings
            found[name] = None
    if NEW:
        modules = [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.cudnn.conv]
        modules += [backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        found["new"] = [module.fp32_precision for module in modules]
    return found


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def no_convolutions() -> None:
    torch.backends.cudnn.allow_tf32 = False


def tf32_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def new_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


def new_for_one() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_for_convolutions() -> None:
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


OLD_WAYS = [lambda: None, medium, no_convolutions, tf32_products]
NEW_WAYS = [new_for_all, new_for_one, new_for_convolutions] if NEW else []


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if NEW:
        for module in (torch.backends, torch.backends.mkldnn.conv):
            module.fp32_precision = "none"


def all_exact() -> bool:
    found = settings()
    return (
        found["products"] in ("highest", None)
        and not found["matmul.allow_tf32"]
        and not found["cudnn.allow_tf32"]
        and set(found.get("new", [])) <= {"ieee", "none"}
    )


@pytest.mark.parametrize("allow", OLD_WAYS + NEW_WAYS)
def test_within_the_block_float32_is_exact_and_after_it_all_is_as_before(allow):
    allow()
    before = settings()
    with full_float32():
        assert all_exact()
    assert settings() == before
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == before


@pytest.mark.skipif(not NEW, reason="torch 2.9 has general settings")
def test_what_was_left_to_the_general_setting_still_follows_it():
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("allow", OLD_WAYS)
def test_the_older_switches_can_be_read_within_the_block(allow):
    """torch.compile reads them before each call of what it has compiled."""
    allow()
    with full_float32():
        assert settings()["matmul.allow_tf32"] is False
        assert settings()["cudnn.allow_tf32"] is False


@pytest.mark.parametrize(
    "measure",
    [
        lambda f: gbr(f, torch.rand(3, 4)),
        lambda f: fgsm(f, torch.rand(3, 4), torch.zeros(3, dtype=torch.long), 0.1),
    ],
)
def test_measurements_compute_in_full_float32(measure):
    medium()
    seen = []

    def forward(x):
        seen.append(all_exact())
        return x @ torch.eye(4)

    measure(forward)
    assert seen
    assert all(seen)
    assert torch.get_float32_matmul_precision() == "medium"
