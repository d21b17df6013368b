"""Checkpoint files: written whole or not at all, checked before they are used, the newest whole one found."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial as partial_of
from pathlib import Path

import pytest
import torch
from exactness import assert_same_run
from helpers import build_runner, digits_config, train
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from enc_plugin.checkpoint_files import find_damage, latest_checkpoint, replacing

LIMIT = 300_000  # bytes; a checkpoint of these runs has twice as many


def save(path: Path) -> Path:
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path)
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + 200 + record.file_size // 2] ^= 1  # behind the record's header
    path.write_bytes(content)


def flip_header(path: Path) -> None:
    """One bit of the compression method in the first entry of the zip directory."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "BadZipFile"),
    "a flipped bit": (flip, "the checksum of its record .* is wrong"),
    "a flipped bit of a header": (flip_header, "NotImplementedError"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 5000), "it starts with zeros"),
    "missing": (Path.unlink, "there is no such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(tmp_path, kind):
    damage, message = DAMAGE[kind]
    path = save(tmp_path / "epoch_1.pth")
    assert find_damage(path) is None
    damage(path)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(find_damage(path))


def test_torch_itself_loads_a_flipped_bit(tmp_path):
    path = save(tmp_path / "epoch_1.pth")
    flip(path)
    assert not torch.equal(torch.load(path)["state_dict"]["weight"], torch.arange(1000.0))


def work_dir_of_three(folder: Path) -> list[Path]:
    """Three checkpoints, one after the other, the last of them named by ``last_checkpoint``."""
    paths = []
    for epoch in (9, 10, 11):
        paths.append(save(folder / f"epoch_{epoch}.pth"))
        os.utime(paths[-1], (epoch, epoch))
    (folder / "last_checkpoint").write_text(str(paths[-1]))
    return paths


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_stands_in_for_a_damaged_last_one(tmp_path, kind):
    first, second, third = work_dir_of_three(tmp_path)
    assert latest_checkpoint(tmp_path, [first, second, third]) == (str(third), [])
    DAMAGE[kind][0](third)
    path, problems = latest_checkpoint(tmp_path, [first, second, third])
    assert path == str(second)
    assert problems[0].startswith(f"{third}: ")
    truncate(second)
    path, problems = latest_checkpoint(tmp_path, [first, second, third])
    assert path == str(first)
    assert len(problems) == 2


@pytest.mark.parametrize("content", ["", None], ids=["empty", "missing"])
def test_a_broken_pointer_is_not_the_end(tmp_path, content):
    paths = work_dir_of_three(tmp_path)
    (tmp_path / "last_checkpoint").unlink() if content is None else (tmp_path / "last_checkpoint").write_text(content)
    path, (problem,) = latest_checkpoint(tmp_path, paths)
    assert path == str(paths[-1])
    assert problem.startswith(f"{tmp_path / 'last_checkpoint'}: ")


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_work_dir_goes_on_from_its_own_checkpoint(tmp_path, how):
    (tmp_path / "old").mkdir()
    paths = work_dir_of_three(tmp_path / "old")
    (tmp_path / "old" / "last_checkpoint").write_text(str(paths[1]))
    how(tmp_path / "old", tmp_path / "new")
    path, _ = latest_checkpoint(tmp_path / "new", (tmp_path / "new").glob("*.pth"))
    assert path == str(tmp_path / "new" / paths[1].name)


def test_an_older_run_in_the_work_dir_is_not_gone_on_from(tmp_path):
    paths = work_dir_of_three(tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(save(tmp_path / "epoch_1.pth")))
    assert latest_checkpoint(tmp_path, paths) == (str(tmp_path / "epoch_1.pth"), [])


def test_no_checkpoint_is_no_problem(tmp_path):
    assert latest_checkpoint(tmp_path, []) == (None, [])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "epoch_1.pth"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pth"]
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_failure_but_a_broken_disk_is(tmp_path, monkeypatch, code):
    def fsync(handle, code=code):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "a.pth") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.pth").read_text() == "new"
    monkeypatch.setattr(os, "fsync", partial_of(fsync, code=errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), replacing(tmp_path / "a.pth") as partial:
        partial.write_text("newer")


def test_links_and_long_names_are_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.pth").symlink_to(tmp_path / "disk" / "file.pth")
    for path in (tmp_path / "link.pth", tmp_path / ("x" * 251 + ".pth")):
        with replacing(path) as partial:
            partial.write_text("new")
        assert path.read_text() == "new"
    assert (tmp_path / "link.pth").is_symlink()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["file.pth"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three epochs."""
    torch.set_num_threads(1)  # runs before the fixture that does this for each test
    work_dir = tmp_path_factory.mktemp("trained") / "run"
    train(digits_config(work_dir, epochs=3))
    return work_dir


def test_a_run_resumes_from_the_newest_whole_checkpoint_with_a_warning(trained, tmp_path):
    work_dir = tmp_path / "run"
    shutil.copytree(trained, work_dir)
    flip(work_dir / "epoch_3.pth")
    train(digits_config(work_dir, epochs=3, resume=True))
    assert_same_run(trained, work_dir, "epoch_3.pth")
    text = "".join(path.read_text() for path in work_dir.glob("*/*.log"))
    assert "cannot resume from" in text
    assert f"resuming from the newest undamaged checkpoint {work_dir / 'epoch_2.pth'}" in text


def test_names_of_checkpoints_may_be_formatted(tmp_path):
    for epochs in (2, 3):
        cfg = digits_config(tmp_path, epochs=epochs, resume=True)
        cfg.default_hooks.checkpoint.filename_tmpl = "[a]_{:03d}.pth"
        if epochs == 3:
            truncate(tmp_path / "[a]_002.pth")
        train(cfg)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["[a]_001.pth", "[a]_002.pth", "[a]_003.pth"]
    log = "".join(path.read_text() for path in tmp_path.glob("*/*.log"))
    assert f"resuming from the newest undamaged checkpoint {tmp_path / '[a]_001.pth'}" in log


def test_a_run_whose_checkpoints_are_all_damaged_says_so(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "last_checkpoint").unlink()
    for path in (tmp_path / "run").glob("*.pth"):
        truncate(path)
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged .*epoch_3.pth: BadZipFile.*--resume"):
        train(digits_config(tmp_path / "run", resume=True))


@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_checkpoint_that_is_named_is_an_error(trained, tmp_path, resume):
    path = tmp_path / "named.pth"
    shutil.copy(trained / "epoch_3.pth", path)
    flip(path)
    with pytest.raises(ValueError, match="load_from: .*named.pth is damaged .the checksum of"):
        train(digits_config(tmp_path / "run", load_from=str(path), resume=resume))


@HOOKS.register_module(force=True)
class _FullDisk(Hook):
    """From the second epoch on, no file grows beyond ``LIMIT``."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))


@contextmanager
def limit_restored():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(trained, tmp_path):
    checkpoint = dict(type="CheckpointHook", interval=1, max_keep_ckpts=1)
    cfg = digits_config(tmp_path, epochs=3, default_hooks__checkpoint=checkpoint, custom_hooks=[dict(type="_FullDisk")])
    message = "epoch_2.pth could not be written .*Earlier checkpoints are unchanged: free disk space"
    with pytest.raises(OSError, match=message), limit_restored():
        train(cfg)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["epoch_1.pth"]
    assert find_damage(tmp_path / "epoch_1.pth") is None
    assert not list(tmp_path.glob(".*.partial*"))
    cfg.custom_hooks, cfg.resume = [], True
    train(cfg)
    assert_same_run(trained, tmp_path, "epoch_3.pth")
    assert [path.name for path in tmp_path.glob("*.pth")] == ["epoch_3.pth"]


def test_a_full_disk_leaves_the_previous_best_checkpoint(tmp_path):
    cfg = digits_config(tmp_path, epochs=2, custom_hooks=[dict(type="_FullDisk")])
    # No other checkpoints; the loss of accuracy is the measure, so that the second epoch's is the best, too.
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", interval=9, save_last=False, save_best="accuracy/top1", rule="less"
    )
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = build_runner(cfg)
    hook = next(hook for hook in runner.hooks if hasattr(hook, "is_better_than"))
    hook.is_better_than["accuracy/top1"] = lambda new, best: True  # equal accuracies
    with pytest.raises(OSError, match="best_accuracy_top1_epoch_2.pth could not be written"), limit_restored():
        runner.train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["best_accuracy_top1_epoch_1.pth"]


def test_a_copy_of_a_work_dir_leaves_the_best_checkpoint_of_the_original_alone(tmp_path):
    def config(work_dir, **options):
        cfg = digits_config(work_dir, **options)
        cfg.default_hooks.checkpoint.update(save_best="accuracy/top1", rule="greater")
        return cfg

    train(config(tmp_path / "original"))
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    runner = build_runner(config(tmp_path / "copy", epochs=2, resume=True))
    hook = next(hook for hook in runner.hooks if hasattr(hook, "is_better_than"))
    hook.is_better_than["accuracy/top1"] = lambda new, best: True
    runner.train()
    best = {path: [file.name for file in (tmp_path / path).glob("best_*")] for path in ("original", "copy")}
    name = "best_accuracy_top1_epoch_{}.pth"
    assert best == {"original": [name.format(1)], "copy": [name.format(2)]}


def test_our_default_hooks_can_be_switched_off(tmp_path):
    cfg = digits_config(tmp_path)
    cfg.default_hooks.update(enc_audit=None, rng_state=None)
    names = [type(hook).__name__ for hook in build_runner(cfg).hooks]
    assert "ENCCheckpointHook" in names
    assert not {"ENCAuditHook", "RNGStateHook"} & set(names)
