"""Cost of GBR, on one thread in float32.

Sections: ``exact`` (time and memory, compared with torch.func and a plain loop), ``probes`` (standard error of random
orthonormal and Gaussian directions, and time to a standard error of 2 %), ``imagenet`` (one projection compared with a
training step), ``hook`` (512 samples compared with an epoch of CIFAR-10).
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from enc_plugin import to_enc
from enc_plugin.functional import gbr
from enc_plugin.functional.directions import orthonormal
from lab import ROOT

from .harness import interleave, ratios
from .networks import classifier, resnet18, resnet20
from .training_step import step

CLASSES = 10


def loop(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The obvious implementation: a backward pass for each class."""
    x = images.clone().requires_grad_()
    out = model(x)
    total = 0
    for c in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[:, c].sum(), x, retain_graph=c + 1 < out.shape[1])
        total = total + gradient.flatten(1).square().sum(1)
    return total


def jacrev(model: nn.Module, images: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    jacobian = torch.func.jacrev(lambda x: model(x[None])[0], chunk_size=chunk)
    with torch.no_grad():
        return torch.func.vmap(jacobian)(images).flatten(1).square().sum(1)


def floor(model: nn.Module, images: torch.Tensor):
    """A forward pass, and a backward pass to the inputs, to be timed separately."""
    x = images.clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    direction = torch.zeros_like(out)
    direction[:, 0] = 1
    return lambda: model(x), lambda: torch.autograd.grad(out, x, direction, retain_graph=True)


def exact_section(rounds: int, batch: int = 16) -> dict:
    model = resnet18().eval()
    images = torch.randn(batch, 3, 32, 32)
    forward, backward = floor(model, images)
    forward_last, backward_last = floor(model, images.contiguous(memory_format=torch.channels_last))
    seconds = interleave(
        {
            "enc_plugin": lambda: gbr(model, images, batch_size=batch),
            "loop of autograd.grad": lambda: loop(model, images),
            "vmap(jacrev)": lambda: jacrev(model, images),
            "vmap(jacrev), chunks of 1": lambda: jacrev(model, images, 1),
            "vmap(jacrev), chunks of 5": lambda: jacrev(model, images, 5),
            "forward": forward,
            "backward to the inputs": backward,
            "forward, channels last": forward_last,
            "backward to the inputs, channels last": backward_last,
        },
        rounds,
    )
    ours = seconds["enc_plugin"]
    reached = {}
    for layout in ("", ", channels last"):
        parts = zip(seconds[f"forward{layout}"], seconds[f"backward to the inputs{layout}"], ours, strict=True)
        reached[f"floor{layout}"] = statistics.median([(f + CLASSES * b) / t for f, b, t in parts])
    values = {"enc_plugin": gbr(model, images), "loop": loop(model, images), "jacrev": jacrev(model, images)}
    return {
        "what": f"exact GBR, ResNet-18 (CIFAR), {CLASSES} classes, batch {batch}, float32",
        "unit": "seconds; ratio to enc_plugin, round by round",
        "to_enc_plugin": ratios(seconds, "enc_plugin"),
        "share_of_floor": reached,
        "bound": {"fastest_other": 1.0, "share_of_floor": 0.95},
        "forwards": statistics.median([t / f for t, f in zip(ours, seconds["forward"], strict=True)]),
        "largest_relative_difference": max(
            ((values["enc_plugin"] - values[k]) / values[k]).abs().max().item() for k in ("loop", "jacrev")
        ),
        "peak_mb_above_the_model": {
            "enc_plugin": {n: peak_memory("enc_plugin", n) for n in (16, 32, 64)},
            "vmap(jacrev)": {n: peak_memory("jacrev", n) for n in (16, 32)},
        },
    }


def peak_memory(method: str, samples: int) -> float:
    """Peak resident memory in MB, minus that of the idle model, in a separate process."""
    command = [sys.executable, "-m", "lab.bench.gbr_cost", method, str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(method: str, samples: int) -> None:
    torch.set_num_threads(1)
    model = resnet18().eval()
    images = torch.randn(samples, 3, 32, 32)
    at_rest = _resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if method == "enc_plugin":
        gbr(model, images, batch_size=16, projections=None)
    else:
        jacrev(model, images)
    print((_resident_kb("VmHWM") - at_rest) / 1024)


def _resident_kb(field: str) -> int:
    # Not ru_maxrss of getrusage, which a child process inherits from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def trained_on_digits(steps: int = 150) -> tuple[nn.Module, torch.Tensor]:
    """An ENC ResNet-8 after a few epochs of scikit-learn's digits, and 256 of its training images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)
    model = classifier("ResNetCIFAR6n", 64, depth=8)
    to_enc(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval(), images[:256]


def gram(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """``J J^T`` of each sample, ``(N, C, C)``, which determines the value of each direction."""
    parts = []
    for x in images.split(16):
        x = x.clone().requires_grad_()
        out = model(x)
        rows = [torch.autograd.grad(out[:, c].sum(), x, retain_graph=True)[0].flatten(1) for c in range(CLASSES)]
        jacobian = torch.stack(rows, 1).double()
        parts.append(jacobian @ jacobian.mT)
    return torch.cat(parts)


def relative_errors(grams: torch.Tensor, projections: int, draws: int = 200) -> dict[str, float]:
    """Relative standard error of the mean over these samples that comes from the random directions."""
    count, size = grams.shape[:2]
    mean = grams.diagonal(dim1=1, dim2=2).sum(1).mean()
    frames = torch.stack([orthonormal(size, projections, seed) for seed in range(draws * count)])
    frames = frames.view(draws, count, projections, size)
    gaussian = torch.randn(draws, count, projections, size, dtype=torch.float64)
    value = {}
    for name, probes, scale in (("orthonormal", frames, size / projections), ("Gaussian", gaussian, 1 / projections)):
        means = torch.einsum("dnpc,nce,dnpe->dn", probes, grams, probes).mean(1) * scale
        value[name] = (means.std() / mean).item()
    return value


def probes_section(rounds: int, samples: int = 32, wanted: float = 0.02) -> dict:
    model = resnet18().eval()
    images = torch.randn(samples, 3, 32, 32)
    cases = {
        "ResNet-18 (CIFAR) as initialised": gram(model, images),
        "ENC ResNet-8 trained on digits": gram(*trained_on_digits()),
    }
    errors, totals = {}, {}
    for name, grams in cases.items():
        traces = grams.diagonal(dim1=1, dim2=2).sum(1)
        at_512 = math.sqrt(len(grams) / 512)
        rows = {p: relative_errors(grams, p) for p in (1, 2, 5)}
        errors[name] = {"samples": len(grams), "relative_standard_error": rows}
        totals[name] = {
            "from_the_choice_of_samples": (traces.std() / traces.mean()).item() / math.sqrt(512),
            **{f"from_{k}_probes": {p: row[k] * at_512 for p, row in rows.items()} for k in rows[1]},
        }
    needed = next((p for p in (1, 2, 5) if all(t["from_orthonormal_probes"][p] <= wanted for t in totals.values())), 10)
    timed = {"exact": lambda: gbr(model, images[:16], batch_size=16)}
    for p in (1, 2, 5):
        timed[f"{p} projections"] = lambda p=p: gbr(model, images[:16], projections=p, batch_size=16)
    times = ratios(interleave(timed, rounds), "exact")
    return {
        "what": "relative standard error of the mean GBR of logits that comes from random directions; 200 draws",
        "fixed_samples": errors,
        "at_512_samples": totals,
        "time": times,
        "projections_for_2_percent_at_512": needed,
        "time_to_2_percent": 1.0 if needed == 10 else times[f"{needed} projections"]["ratio"],
        "bound": {"time_to_2_percent": 0.25},
    }


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step of SGD with momentum and leaves ``model`` in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    take_step = step(optimizer, lambda: F.cross_entropy(model(images), labels))

    def call() -> None:
        model.train()
        take_step()
        model.eval()

    return call


def imagenet_section(rounds: int, batch: int = 16) -> dict:
    model = classifier("ResNet", 2048, classes=1000, depth=50).eval()
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    candidates = {
        "training step": training_step(model, images, labels),
        "one projection": lambda: gbr(model, images, projections=1, batch_size=batch),
    }
    seconds = interleave(candidates, rounds)
    return {
        "what": f"ResNet-50, 1000 classes, batch {batch}, 224 x 224: one projection compared with a training step",
        "to_training_step": ratios(seconds, "training step"),
        "bound": {"one projection": 0.75},
    }


def hook_section(rounds: int, batch: int = 64, num_samples: int = 512, epoch: int = 50_000) -> dict:
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, CLASSES, (batch,))
    result = {"what": f"{num_samples} samples compared with an epoch of {epoch}, ResNet-20 (CIFAR), batch {batch}"}
    for name in ("plain", "ENC"):
        model = resnet20().eval()
        if name == "ENC":
            to_enc(model)
        candidates = {"training step": training_step(model, images, labels)}
        for projections in (None, 1):
            how = "exact" if projections is None else "one projection"
            candidates[how] = lambda m=model, p=projections: gbr(m, images, projections=p, batch_size=batch)
        for size in (16, 32):
            candidates[f"one projection, batches of {size}"] = lambda m=model, s=size: [
                gbr(m, part, projections=1, batch_size=s) for part in images.split(s)
            ]
        seconds = interleave(candidates, rounds)
        table, share = ratios(seconds, "training step"), num_samples / epoch
        result[name] = {
            "to_training_step": table,
            "share_of_epoch": {k: row["ratio"] * share for k, row in table.items() if k != "training step"},
        }
    return result | {"bound": {"exact": 0.08}}


def run(rounds: int = 7) -> dict:
    """Run all sections; takes about five minutes on an idle core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        "exact": exact_section(rounds),
        "probes": probes_section(rounds),
        "imagenet": imagenet_section(max(5, rounds - 2)),
        "hook": hook_section(rounds),
    }


if __name__ == "__main__":  # started by ``peak_memory``
    print_peak(sys.argv[1], int(sys.argv[2]))
