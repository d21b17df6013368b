"""Hooks that measure leave no trace: the run with them is the run without them, bit for bit.

Compared are weights, optimizer state, schedules, log histories and all random states of the last checkpoint, and every
logged scalar but clocks and what the hook itself logs. A hook of this kind needs one line in ``OBSERVERS``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness import assert_same, end_of, logged
from helpers import digits_config, train

# A hook: the options that make it busy, and the prefix of what it logs.
OBSERVERS = {
    "GBRHook": (dict(num_samples=24, batch_size=16), "gbr/"),
    "FGSMHook": (dict(eps=[2, 8], num_samples=24, batch_size=16), "fgsm/"),
    "ENCAuditHook": ({}, "enc/"),
    "ENCMonitorHook": (dict(interval=1, per_layer=True), "enc_monitor/"),
}
# Random numbers are drawn in loading, in training and in validation.
SETTINGS = {
    "float32": {},
    "bfloat16 and workers": dict(
        optim_wrapper__type="AmpOptimWrapper", train_dataloader__num_workers=2, val_dataloader__num_workers=2
    ),
    "averaging and activation checkpointing": dict(model__backbone__with_cp=True, hooks=[dict(type="EMAHook")]),
}


def run(work_dir: Path, observers: list[str], setting: str) -> Path:
    options = dict(SETTINGS[setting])
    hooks = options.pop("hooks", [])
    cfg = digits_config(work_dir, epochs=2, default_hooks__logger__interval=1, **options)
    cfg.merge_from_dict(dict(model=dict(train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)))))
    cfg.val_dataloader.dataset.pipeline.insert(0, dict(type="RandomFlip", prob=0.5, direction="horizontal"))
    cfg.default_hooks.enc_audit = None  # it is among the observers
    cfg.custom_hooks = [*hooks, *(dict(type=name, **OBSERVERS[name][0]) for name in observers)]
    train(cfg)
    return work_dir


def assert_no_trace(observed: Path, plain: Path) -> None:
    ends = [end_of(folder / "epoch_2.pth") for folder in (observed, plain)]
    own = tuple(prefix for _, prefix in OBSERVERS.values())
    for end in ends:  # what FGSMHook gives to save_best enters the history of metrics
        end.pop("efolds", None)  # what ENCMonitorHook counts
        end["history"] = {k: v for k, v in end["history"].items() if not k.startswith(tuple(f"val/{x}" for x in own))}
    assert_same(*ends)
    lines = [logged(folder) for folder in (observed, plain)]
    assert all(any(key[2].startswith(prefix) for key in lines[0]) for prefix in own if prefix != "enc/")
    lines[0] = {key: value for key, value in lines[0].items() if not key[2].startswith(own)}
    assert_same(*(dict(sorted(line.items())) for line in lines))
    assert {"loss", "lr", "accuracy/top1"} <= {key[2] for key in lines[1]}


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_observers_together_leave_no_trace(tmp_path, setting):
    observed, plain = run(tmp_path / "run", list(OBSERVERS), setting), run(tmp_path / "plain", [], setting)
    assert_no_trace(observed, plain)


def test_storing_random_states_leaves_no_trace(tmp_path):
    ends = []
    for hook in (None, dict(type="RNGStateHook")):
        cfg = digits_config(tmp_path / str(hook is None), epochs=2)
        cfg.default_hooks.rng_state = hook
        train(cfg)
        ends.append(end_of(Path(cfg.work_dir, "epoch_2.pth")))
    assert ends[1].pop("rng_state")
    assert_same(*ends)
