"""What the README and the pages of docs/ say runs: configs train, Python and commands run, links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import tomllib
import torch
import torchvision
from helpers import ROOT, build_runner, dist_train, run_tool, scalars
from mmengine.config import Config
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner

from enc_plugin.doctor import BROKEN
from enc_plugin.doctor.config import check_config
from enc_plugin.surgery.projected import constrained_layers

README = ROOT / "README.md"
PAGES = {path: path.read_text() for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {path: re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for path, text in PAGES.items()}
PYTHON = {path: [code for language, code in blocks if language == "python"] for path, blocks in BLOCKS.items()}
# Pages repeat some of the README.
CONFIGS = list(dict.fromkeys(code for codes in PYTHON.values() for code in codes if "_base_ =" in code))
COMMANDS = list(
    dict.fromkeys(
        line.split(" #")[0].strip()
        for blocks in BLOCKS.values()
        for language, code in blocks
        if language == "bash"
        for line in code.splitlines()
    )
)
# Smaller networks and pictures: the configs stand as they are but for this.
SMALL = {
    "model.backbone.depth": 18,
    "model.head.in_channels": 512,
    "train_cfg.max_epochs": 1,
    "default_hooks.logger.interval": 1,
    "train_dataloader.batch_size": 5,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The README's configs as files, pictures of five classes, and a checkpoint of the plain network."""
    folder = tmp_path_factory.mktemp("readme")
    for name, code in zip(("my_enc", "pictures", "mine", "pretrained"), CONFIGS, strict=True):
        (folder / f"{name}.py").write_text(code)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(5):
            place = folder / "my" / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(2):
                cv2.imwrite(str(place / f"{i}.png"), rng.integers(0, 256, (40, 40, 3), np.uint8))
    return folder


def train_small(folder: Path, name: str, **options) -> Runner:
    cfg = Config.fromfile(folder / f"{name}.py")
    cfg.work_dir = str(folder / f"run_{name}")
    cfg.merge_from_dict({**SMALL, **options})
    runner = build_runner(cfg)
    runner.train()
    assert all(np.isfinite(line["loss"]) for line in scalars(cfg.work_dir) if "loss" in line)
    return runner


def test_each_way_to_enc_takes_at_most_five_lines():
    ways = [*CONFIGS, next(code for code in PYTHON[README] if "to_enc(model)" in code)]
    assert len(ways) == 5
    for code in ways:
        assert len([line for line in code.splitlines() if line.strip()]) <= 5


def test_the_stock_config_becomes_an_enc_network(folder):
    findings = {f.name: f for f in check_config(str(folder / "my_enc.py"))}
    assert [f.name for f in findings.values() if f.state == BROKEN] == ["data"]  # ImageNet is not here
    assert findings["ENC"].found.startswith("54 layers (ws); 1 with an added batch norm: head.fc")
    cfg = Config.fromfile(folder / "my_enc.py")
    assert cfg.optim_wrapper.constructor == "ENCOptimWrapperConstructor"
    assert cfg.runner_type == "ENCRunner"


def test_ones_own_pictures_train_and_validate(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runner = train_small(folder, "pictures")
    assert runner.model.head.num_classes == 5
    assert len(runner.train_dataloader.dataset) == len(runner.val_dataloader.dataset) == 10
    assert any("accuracy/top1" in line for line in scalars(runner.work_dir))
    assert len(runner.model.enc_report) == 21


def test_a_pretrained_checkpoint_keeps_its_function(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.manual_seed(1)
    stock = Config.fromfile(folder / "my_enc.py")
    stock.merge_from_dict({"model.type": "ImageClassifier", **SMALL})
    from mmpretrain import get_model

    plain = get_model(stock, pretrained=False).eval()
    torch.save({"state_dict": plain.state_dict()}, folder / "plain.pth")
    cfg = Config.fromfile(folder / "pretrained.py")
    cfg.merge_from_dict(SMALL)
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    enc = get_model(cfg, pretrained=False)
    enc.load_state_dict(torch.load(cfg.load_from)["state_dict"], strict=False)
    assert len(enc.enc_report) == 21
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(enc.eval()(images), plain(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("library", [timm.create_model, torchvision.models.get_model])
def test_a_checkpoint_of_another_library_is_measured_and_attacked(library, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    torch.save(library("resnet18", num_classes=5).state_dict(), "mine.pth")
    for tool in ("measure_gbr", "attack"):
        assert f"`python tools/{tool}.py mine.py mine.pth`" in PAGES[README]
        run_tool(tool, ["mine.py", "mine.pth", "--num-samples", "2"], monkeypatch)
    printed = capsys.readouterr().out
    assert "over 2 training samples" in printed
    assert "of 2 test samples" in printed


@pytest.mark.parametrize("page", [page for page, codes in PYTHON.items() if codes], ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_in_order(page):
    namespace: dict = {"timm": timm, "torch": torch, "model": timm.create_model("resnet18", num_classes=10)}
    for code in PYTHON[page]:
        if "_base_ =" not in code:
            exec(compile(code, page.name, "exec"), namespace)
    if "values" in namespace:
        assert namespace["values"].shape == (8,)
    if "held" in namespace:
        assert len(list(constrained_layers(namespace["projected"]))) == 21
    if "visualizer" in namespace:
        backends = [backend["type"] for backend in namespace["visualizer"]["vis_backends"]]
        assert len(backends) == 4
        assert all(VISBACKENDS.get(backend) for backend in backends)
    for hook in namespace.get("custom_hooks", []):
        HOOKS.build(hook)


def test_the_tools_run_in_the_readmes_order(tmp_path, monkeypatch):
    """One epoch where the README has twenty."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    tools = [command for command in COMMANDS if command.startswith("python tools/") and "doctor" not in command]
    names = [shlex.split(command)[1].split("/")[1] for command in tools]
    assert sorted(names) == ["attack.py", "fold.py", "measure_gbr.py", "report.py", "train.py"]
    assert names[0] == "train.py"
    for command in tools:
        python, tool, *arguments = shlex.split(command.replace("epoch_20", "epoch_1"))
        assert (python, Path(tool).parent) == ("python", Path("tools"))
        short = ["--cfg-options", "train_cfg.max_epochs=1"] if tool == "tools/train.py" else []
        run_tool(Path(tool).stem, [*arguments, *short], monkeypatch)
    assert (tmp_path / "folded.pth").is_file()
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_distributed_command_runs(tmp_path):
    (command,) = (command for command in COMMANDS if "dist_train.sh" in command)
    _, _, config, processes = shlex.split(command)
    dist_train(config, int(processes), "--work-dir", str(tmp_path), "--cfg-options", "train_cfg.max_epochs=1")
    assert (tmp_path / "epoch_1.pth").is_file()


def test_every_other_command_is_known():
    """The doctor's, mim's and pip's have tests of their own; make's are make's."""
    others = [c for c in COMMANDS if not c.startswith("python tools/") and "dist_train.sh" not in c]
    assert others == ["pip install -e '.[lite]'", "make demo", "make test"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"lite", "tensorboard", "wandb", "mlflow"} <= extras.keys()
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{command.removeprefix('make ')}: " in makefile for command in others if "make" in command)


def test_linked_files_exist():
    for page, text in PAGES.items():
        links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
        paths = re.findall(r"((?:tools|examples|configs|tests|lab)/[\w./-]+\.(?:py|sh))", text)
        missing = [link for link in links if not (page.parent / link).exists()]
        missing += [path for path in paths if not (ROOT / path).exists()]
        assert not missing, page


def test_anchors_of_links_are_headings():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, (page, target, anchor)


def test_rows_of_tables_have_as_many_cells_as_their_heads():
    """Else the page shows no table, or leaves cells out."""
    for page in (*PAGES, *ROOT.glob("configs/**/*.md"), *ROOT.glob("lab/**/*.md")):
        for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE):
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(cells) == 1, (page, table)


def test_pages_have_a_place_in_the_contents_and_lines_that_can_be_read():
    contents = (ROOT / "docs" / "README.md").read_text()
    for page, text in PAGES.items():
        if page.parent.name == "docs" and page.name != "README.md":
            assert f"({page.name})" in contents
            assert f"(docs/{page.name})" in PAGES[README]
        longest = max(len(line) for line in text.splitlines())
        assert longest <= (200 if page == README else 300), page
    assert len(PAGES[README].splitlines()) <= 150


def test_messages_that_the_faq_quotes_are_those_of_the_code():
    quoted = re.findall(r"^\*\*`([^`]+)`", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    foreign = ("KeyError", "UnpicklingError", "No module named", "Unexpected key", "--cfg-options")
    ours = [message for message in quoted if not message.startswith(foreign)]
    assert len(ours) >= 4
    # Texts of the code as one line each: adjacent strings are joined.
    code = "".join(path.read_text() for path in (ROOT / "enc_plugin").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    missing = [part for message in ours for part in message.split("...") if part.strip() not in code]
    assert not missing
