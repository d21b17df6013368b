"""Every config builds what its name says; every mechanism trains; the sizes are the paper's."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIGS, ROOT, build_runner, digits_config, run_tool, scalars
from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

from enc_plugin.build import build_model
from enc_plugin.convert import enc_layers, fold
from enc_plugin.surgery.projected import constrained_layers
from lab.zoo import complexity, imagenet_configs

RECIPE = dict(epochs=100, milestones=[30, 60, 90], gamma=0.1, lr=0.1, momentum=0.9, batch_size=32)

# ENC layers, post-norms, variant, alpha and shift eps; None for networks without ENC.
R50 = (54, 1, "ws", 1.0, 1e-3)
RESNET8 = (10, 1, "ws", 1.0, 1e-3)
TABLE = {
    "resnet50_8xb32": None,
    "resnet50_enc_8xb32": R50,
    "resnet101_8xb32": None,
    "resnet101_enc_8xb32": (105, 1, "ws", 1.0, 1e-6),
    "resnext50-32x4d_8xb32": None,
    "resnext50-32x4d_enc_8xb32": R50,
    "resnext101-32x4d_8xb32": None,
    "resnext101-32x4d_enc_8xb32": (105, 1, "ws", 1.0, 1e-3),
    "seresnet50_8xb32": None,
    "seresnet50_enc_8xb32": (86, 33, "ws", 1.0, 1e-3),
    "seresnet101_8xb32": None,
    "seresnet101_enc_8xb32": (171, 67, "ws", 1.0, 1e-6),
    "densenet201_8xb32": None,
    "densenet201_enc_8xb32": (201, 1, "ws", 1.0, 1e-8),
    "timm-resnet50_enc_8xb32": R50,
    "table1/resnet50_wn_8xb32": None,
    "table1/resnet50_ws_8xb32": None,
    "table1/resnet50_enc-fro_8xb32": (54, 1, "fro", 1.0, 1e-3),
    "table1/resnet50_enc-wn_8xb32": (54, 1, "wn", 1.0, 1e-3),
    "table1/resnet50_enc-ws_8xb32": R50,
    "table1/resnet50_enc-centered-fro_8xb32": (54, 1, "centered_fro", 1.0, 1e-3),
    "table2/resnet50_dropout_8xb32": None,
    "table2/resnet50_dropblock_8xb32": None,
    "table2/resnet50_cutout_8xb32": None,
    "table2/resnet50_mixup_8xb32": None,
    "table2/resnet50_cutmix_8xb32": None,
    "table2/resnet50_ls_8xb32": None,
    "table2/resnet50_enc-cutout_8xb32": R50,
    "table2/resnet50_enc-mixup_8xb32": R50,
    "table2/resnet50_enc-cutmix_8xb32": R50,
    "table2/resnet50_enc-ls_8xb32": R50,
    "table2/resnet50_enc-cutout-ls_8xb32": R50,
    "table2/resnet50_enc-mixup-ls_8xb32": R50,
    "table2/resnet50_enc-cutmix-ls_8xb32": R50,
    "table5/resnet50_enc-alpha05_8xb32": (54, 1, "ws", 0.5, 1e-3),
    "table5/resnet50_enc-alpha1_8xb32": R50,
    "table5/resnet50_enc-alpha2_8xb32": (54, 1, "ws", 2.0, 1e-3),
    "table5/resnet50_enc-alpha-learnable_8xb32": (54, 1, "ws", "learnable", 1e-3),
    "figure1/resnet50_wd0_8xb32": None,
    "figure1/resnet50_wd1e-8_8xb32": None,
    "figure1/resnet50_wd1e-6_8xb32": None,
    "figure1/resnet50_wd1e-4_8xb32": None,
    "figure1/resnet50_wd1e-3_8xb32": None,
    "figure1/resnet50_wd1e-2_8xb32": None,
    "figure3/resnet50_wd1e-4_8xb32": None,
    "figure3/resnet50_wd1e-3_8xb32": None,
    "figure3/resnet50_enc_wd1e-4_8xb32": R50,
    "cifar10/resnet20_2xb64": None,
    "cifar10/resnet20_enc-ws_2xb64": (22, 1, "ws", 1.0, 1e-3),
    "cifar10/resnet20_enc-projected_2xb64": (22, 1, "ws", 1.0, 1e-3),
    "digits/resnet8_1xb64": None,
    "digits/resnet8_enc-fro_1xb64": (10, 1, "fro", 1.0, 1e-3),
    "digits/resnet8_enc-wn_1xb64": (10, 1, "wn", 1.0, 1e-3),
    "digits/resnet8_enc-ws_1xb64": RESNET8,
    "digits/resnet8_enc-centered-fro_1xb64": (10, 1, "centered_fro", 1.0, 1e-3),
    "digits/resnet8_enc-projected_1xb64": RESNET8,
    "digits/resnet8_enc-alpha05_1xb64": (10, 1, "ws", 0.5, 1e-3),
    "digits/resnet8_enc-alpha2_1xb64": (10, 1, "ws", 2.0, 1e-3),
    "digits/resnet8_enc-alpha-learnable_1xb64": (10, 1, "ws", "learnable", 1e-3),
    "digits/resnet8_enc-cutmix-ls_1xb64": RESNET8,
    "digits/resnet8_enc-gbr_1xb64": RESNET8,
    "digits/resnet8_wn_1xb64": None,
    "digits/resnet8_ws_1xb64": None,
    "digits/resnet8_dropout_1xb64": None,
    "digits/resnet8_dropblock_1xb64": None,
    "digits/resnet8_cutout_1xb64": None,
    "digits/resnet8_mixup_1xb64": None,
    "digits/resnet8_cutmix_1xb64": None,
    "digits/resnet8_ls_1xb64": None,
    "digits/timm-resnet18_enc_1xb64": (22, 1, "ws", 1.0, 1e-3),
}

# The paper's Table 4: parameters (M) and GFLOPs.
TABLE_4 = {
    "resnet50": (25.56, 4.122),
    "resnet101": (44.55, 7.850),
    "resnext50-32x4d": (25.03, 4.273),
    "resnext101-32x4d": (44.18, 8.033),
    "seresnet50": (28.09, 4.130),
    "seresnet101": (49.36, 7.863),
    "densenet201": (20.01, 4.367),
}


@pytest.fixture
def on_meta(monkeypatch):
    """Build without memory or initialisation; mmpretrain's ResNet reads one tensor while it is built."""
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        yield


@functools.cache
def _load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def load(name: str) -> Config:
    """A config of its own, read from the file once."""
    return copy.deepcopy(_load(name))


def size(model: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_the_table_names_every_config():
    found = {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.py")}
    known = {name for name in found if not name.startswith("_base_/")}
    assert set(TABLE) <= known
    # Other folders may join; those of the paper's grid may not hold a config that the table does not know.
    grid = ("table", "figure", "digits/")
    assert {n for n in known - set(TABLE) if "/" not in n or n.startswith(grid)} == set()


@pytest.mark.parametrize("name", TABLE)
def test_config_builds_the_layers_of_the_written_table(name, on_meta):
    config = load(name)
    layers = [layer for _, layer in constrained_layers(build_model(config))]
    if TABLE[name] is None:
        assert layers == []
        return
    count, norms, variant, alpha, eps = TABLE[name]
    assert (len(layers), sum(layer.enc_norm is not None for layer in layers)) == (count, norms)
    assert {layer.enc_variant for layer in layers} == {variant}
    assert {"learnable" if layer.enc_log_alpha is not None else layer.enc_alpha for layer in layers} == {alpha}
    assert config.optim_wrapper.get("paramwise_cfg", {}).get("shift_eps", 1e-3) == eps


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith(("digits/", "cifar10/"))])
def test_imagenet_config_has_the_papers_recipe(name):
    config = load(name)
    sgd = config.optim_wrapper.optimizer
    decay = name.split("_wd")[1].split("_")[0] if "_wd" in name else "1e-4"
    assert (sgd.type, sgd.weight_decay) == ("SGD", float(decay))
    assert config.optim_wrapper.constructor == "ENCOptimWrapperConstructor"
    found = dict(
        epochs=config.train_cfg.max_epochs,
        milestones=config.param_scheduler.milestones,
        gamma=config.param_scheduler.gamma,
        lr=sgd.lr,
        momentum=sgd.momentum,
        batch_size=config.train_dataloader.batch_size,
    )
    assert found == RECIPE
    steps = [step["type"] for step in config.train_dataloader.dataset.pipeline]
    cutout = ["Cutout"] if "cutout" in name else []
    assert steps == ["LoadImageFromFile", "RandomResizedCrop", "RandomFlip", *cutout, "PackInputs"]
    zero_init = config.model.get("backbone", {}).get("zero_init_residual", config.model.get("zero_init_last", False))
    assert not zero_init


@pytest.mark.parametrize("name", TABLE_4)
def test_folded_size_of_table_4_is_the_papers(name, on_meta):
    params, _ = TABLE_4[name]
    plain, enc = build_model(load(f"{name}_8xb32")), build_model(load(f"{name}_enc_8xb32"))
    assert size(plain) == pytest.approx(params, abs=0.15)
    assert size(fold(enc)) == size(plain)


@pytest.mark.parametrize("name", TABLE_4)
def test_parameters_and_gflops_of_table_4_are_the_papers_within_a_percent(name, monkeypatch):
    # Counting runs the network once; the values of the weights do not matter.
    for init in ("kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(nn.init, init, lambda tensor, *args, **kwargs: tensor)
    params, gflops = TABLE_4[name]
    counted = complexity(build_model(load(f"{name}_8xb32")))
    assert counted.params / 1e6 == pytest.approx(params, rel=0.01)
    assert counted.flops / 1e9 == pytest.approx(gflops, rel=0.01)


def test_densenet_convolutions_start_as_kaiming_says():
    config = load("densenet201_enc_8xb32")
    config.model.backbone.arch = dict(growth_rate=32, depths=[2, 2], init_channels=64)
    config.model.head.in_channels = 128
    model = build_model(config)
    model.init_weights()
    weight = model.backbone.transitions[0].conv.weight
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.05)


MECHANISMS = [name.removeprefix("digits/") for name in TABLE if name.startswith("digits/")]


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_trains_two_iterations_and_validates(name, tmp_path):
    config = digits_config(tmp_path, name, train_dataloader__dataset__indices=128, default_hooks__logger__interval=1)
    config.default_hooks.checkpoint = None
    runner = build_runner(config)
    runner.train()
    lines = scalars(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert any("accuracy/top1" in line for line in lines)
    if "gbr" in name:
        assert any("gbr/logits" in line for line in lines)
    # A mechanism that acts during training alone leaves a trace of its action.
    if "dropblock" in name:
        assert {m.progress for m in runner.model.modules() if type(m).__name__ == "DropBlock"} == {0.5}
    if "_wn_" in name:
        gains = [p for key, p in runner.model.named_parameters() if key.endswith("gain")]
        assert gains
        assert all((gain != 1).any() for gain in gains)
    if "learnable" in name:
        assert all(layer.log_alpha.item() != 0 for _, layer in enc_layers(runner.model))


@pytest.mark.parametrize(
    "name", ["seresnet50_enc_8xb32", pytest.param("densenet201_enc_8xb32", marks=pytest.mark.slow)]
)
def test_architecture_of_table_4_trains_at_small_input_size(name, tmp_path):
    """The network and its optimizer as the config says, on digits scaled up to 32 pixels."""
    config, data = load(name), digits_config(tmp_path)
    for key in ("train_dataloader", "val_dataloader", "val_evaluator", "test_dataloader", "test_evaluator"):
        config[key] = data[key]
    resize = dict(type="Resize", scale=32)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.batch_size = 4
        loader.dataset.update(indices=8, pipeline=[resize, dict(type="PackInputs")])
    config.update(work_dir=str(tmp_path), launcher="none")
    config.train_cfg.max_epochs = 1
    config.default_hooks.checkpoint = None
    config.default_hooks.logger.interval = 1
    runner = build_runner(config)
    runner.train()
    losses = [line["loss"] for line in scalars(tmp_path) if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    shifts = {group["shift_eps"] for group in runner.optim_wrapper.param_groups if "shift_eps" in group}
    assert shifts == {TABLE[name][-1]}


@pytest.fixture(scope="module")
def miniature_imagenet(tmp_path_factory) -> Path:
    """ImageNet's layout in small, made of digits: ten of the thousand classes, two pictures each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("imagenet")
    (root / "meta").mkdir()
    digits = load_digits()
    for split, start in (("train", 0), ("val", 10)):
        lines = []
        for i in range(start, start + 10):
            folder = root / split / f"n{digits.target[i]:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = np.repeat(np.uint8(digits.images[i] * 15)[..., None], 3, axis=-1)
            Image.fromarray(picture).resize((240, 280)).save(folder / f"{i}.JPEG")
            lines.append(f"{folder.name}/{i}.JPEG {digits.target[i]}\n")
        (root / "meta" / f"{split}.txt").write_text("".join(lines))
    return root


def test_train_tool_runs_an_imagenet_config_on_a_miniature_folder(miniature_imagenet, tmp_path, monkeypatch):
    """Unmodified but for data_root, batch size and epochs."""
    options = [f"{split}_dataloader.dataset.data_root={miniature_imagenet}" for split in ("train", "val", "test")]
    options += ["train_dataloader.batch_size=5", "val_dataloader.batch_size=5", "train_cfg.max_epochs=1"]
    config = CONFIGS / "table2" / "resnet50_enc-cutmix-ls_8xb32.py"
    run_tool("train", [config, "--work-dir", tmp_path, "--cfg-options", *options], monkeypatch)
    assert "54 layers (ws, alpha 1), 1 with an added batch norm" in next(tmp_path.glob("*/*.log")).read_text()
    lines = scalars(tmp_path)
    assert any("accuracy/top1" in line and np.isfinite(line["accuracy/top1"]) for line in lines)
    assert (tmp_path / "epoch_1.pth").is_file()


def test_ecosystem_lists_every_imagenet_config():
    from mmpretrain.apis import get_model, list_models
    from mmpretrain.apis.model import ModelHub

    ModelHub.register_model_index(ROOT / "model-index.yml", config_prefix=ROOT)
    names = {Path(name).name for name in TABLE if not name.startswith(("digits/", "cifar10/"))}
    assert names == {path.stem for path in imagenet_configs(CONFIGS)}
    listed = set(list_models(task="Image Classification"))
    assert names <= listed
    for name in names:
        assert Path(ModelHub._models_dict[name].config).is_file()
    model = get_model("resnet50_enc_8xb32")
    assert sum(1 for _ in enc_layers(model)) == 54


def test_every_readme_row_links_to_a_config_and_has_its_sizes():
    rows = 0
    for readme in CONFIGS.rglob("README.md"):
        lines = readme.read_text().splitlines()
        head: list[str] = []
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            head = (head or cells) if cells else []
            if "params (M)" in head and ".py)" in line:
                rows += 1
                assert cells[head.index("params (M)")], line
                assert cells[head.index("GFLOPs")], line
                if "top-1 here (%)" in head:
                    assert cells[head.index("top-1 here (%)")] == "", "a result needs a run"
        for target in re.findall(r"\]\(([^)#]+)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme}: {target}"
    assert rows > 40


def test_measuring_is_added_to_an_imagenet_config_by_the_line_of_the_readme(tmp_path):
    line = re.search(r"`(_base_ = .*measure_imagenet.py\"\])`", (CONFIGS / "README.md").read_text())[1]
    (tmp_path / "measured.py").write_text(line.replace('"./', f'"{CONFIGS}/'))
    measured, plain = (Config.fromfile(path) for path in (tmp_path / "measured.py", CONFIGS / "resnet50_enc_8xb32.py"))
    assert [HOOKS.build(hook).scalar_names[0] for hook in measured.custom_hooks] == ["gbr/logits", "fgsm/top1_clean"]
    assert {**measured.to_dict(), "custom_hooks": None} == {**plain.to_dict(), "custom_hooks": None}
