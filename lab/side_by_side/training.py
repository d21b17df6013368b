"""One run of the grid in training: network, optimizer, and steps that a GPU repeats without the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from mmpretrain.models.losses import LabelSmoothLoss
from torch import Tensor, nn

from enc_plugin import add_projection
from enc_plugin.build import build_model
from enc_plugin.functional import gbr_penalty
from enc_plugin.measuring.pixels import preprocess
from enc_plugin.steps.projected_groups import projected_groups

from ..study.execute import channels_last
from ..study.grid import PlannedRun
from .augmentation import augment, mix, padded
from .draws import Draws
from .pictures import load_pictures
from .recipe import Recipe, check_known, validated_epochs

# Steps before graphs are captured: batch norms of ENC networks average their first ten statistics in another way
# (enc_plugin.surgery.startup_average), and libraries prepare what they need.
_PLAIN_STEPS = 12


class Training:
    """One run in training, by the same numbers as mmengine's runner: weights, order, augmentation, learning rates.

    Runs of equal seed and recipe share their numbers, and all share their pictures. On a GPU the run has a stream of
    its own, and a step is one CUDA graph for each size of batch, captured anew when the learning rate changes. Noise on
    inputs and the directions of the GBR penalty alone are drawn on the device, by the run's own generator: these differ
    from the runner's.

    Args:
        run: The run.
        root: The project's folder, which the arena's config is relative to.
        device: Where to train.

    Raises:
        ValueError: If the config asks for what is not known here.
    """

    def __init__(self, run: PlannedRun, root: str | Path, device: torch.device):
        self.run, self.device, self.cfg = run, device, run.config(root)
        check_known(self.cfg)
        self.train, self.test = load_pictures(self.cfg)
        self.recipe = Recipe.of(self.cfg)
        set_random_seed(run.seed)  # weights are drawn on the CPU, so that all devices start alike
        self.model = initial_network(self.cfg)
        at_start = tuple(torch.get_rng_state().tolist())
        self.model.to(device)
        if device.type == "cpu":
            channels_last(self.model)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            self.optimizer = build_optim_wrapper(self.model, self.cfg.optim_wrapper).optimizer
        if projected_groups(self.optimizer):
            add_projection(self.optimizer)  # as ENCProjectionHook, before the first forward pass

        batch, self.epochs, self.epoch = self.cfg.train_dataloader.batch_size, self.cfg.train_cfg.max_epochs, 0
        full, rest = divmod(len(self.train), batch)
        self.sizes = [batch] * full + [rest] * (rest > 0)
        self.validated = validated_epochs(self.cfg)
        self._draws = _shared_draws(run.seed, self.recipe, tuple(self.sizes), at_start, tuple(self.validated))

        self._source = padded(self.train, self.recipe.padding, device)
        self._labels = self.train.on(device)[1]
        self._classes = torch.eye(self.model.head.num_classes, device=device)
        self._shares = self.recipe.mixing is not None or isinstance(self.model.head.loss_module, LabelSmoothLoss)
        self._numbers: dict[str, Tensor] = {}  # of the epoch; graphs read from where these were when captured
        self._batch, self._place = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._loss = torch.zeros((), device=device)
        self._generator = torch.Generator(device).manual_seed(run.seed)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by size of the batch
        self._steps, self._seen = 0, set()
        self._stream = None
        if device.type == "cuda":
            self.test.on(device)
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # all of the above, of other runs too

    def begin_epoch(self) -> None:
        """Learning rate and numbers of the next epoch."""
        schedule = self.cfg.param_scheduler
        if self.epoch in schedule.milestones:
            for group in self.optimizer.param_groups:
                group["lr"] *= schedule.gamma
            self._graphs.clear()
        with self._on_stream():
            for name, drawn in self._draws.epoch(self.epoch).items():
                numbers = torch.from_numpy(drawn)
                if name in self._numbers:
                    self._numbers[name].copy_(numbers)
                else:
                    self._numbers[name] = numbers.to(self.device, copy=True)  # other runs share the drawn ones
            for counter in (self._batch, self._place, self._loss):
                counter.zero_()
        self.model.train()

    def step(self, number: int) -> None:
        """Step ``number`` of the epoch."""
        size = self.sizes[number]
        with self._on_stream():
            if self._stream is None or self._steps < _PLAIN_STEPS or size not in self._seen:
                self._step(size)
            else:
                if size not in self._graphs:
                    self._graphs[size] = self._captured(size)
                self._graphs[size].replay()  # capturing has computed nothing
        self._steps += 1
        self._seen.add(size)

    def end_epoch(self) -> float:
        """The epoch's mean loss; waits for the device.

        Raises:
            FloatingPointError: If the loss is NaN or infinite.
        """
        self.epoch += 1
        with self._on_stream():
            loss = self._loss.item() / len(self.sizes)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the mean loss of epoch {self.epoch} is NaN or infinite")
        return loss

    @contextmanager
    def measured(self) -> Iterator[nn.Module]:
        """Block for measurements of the network. All runs make them in one stream, so that they share its memory."""
        if self._stream is None:
            yield self.model
            return
        common = torch.cuda.current_stream(self.device)
        common.wait_stream(self._stream)
        yield self.model
        self._stream.wait_stream(common)

    def _on_stream(self) -> AbstractContextManager:
        """Block in which the run's own stream is the current one, if it has one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _captured(self, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if hasattr(graph, "register_generator_state"):  # newer versions of torch find the generator by themselves
            graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, stream=self._stream):
            self._step(size)
        return graph

    def _step(self, size: int) -> None:
        places = self._place + torch.arange(size, device=self.device)
        index = self._numbers["order"].index_select(0, places)
        pixels = augment(self._source, index, self._numbers["picture"].index_select(0, places), self.recipe)
        inputs, target = preprocess(self.model, pixels), self._labels.index_select(0, index)
        if self._shares:
            target = self._classes.index_select(0, target)
        if self.recipe.mixing is not None:
            inputs, target = mix(inputs, target, self._of_batch(places), self.recipe, self._generator)
        loss = self._objective(inputs, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._loss += loss.detach()
        self._place += size
        self._batch += 1

    def _of_batch(self, places: Tensor) -> dict[str, Tensor]:
        if "share" not in self._numbers:
            return {}
        found = {name: self._numbers[name].index_select(0, self._batch)[0] for name in ("share", "box")}
        return found | {"partner": self._numbers["partner"].index_select(0, places)}

    def _objective(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The loss of ``ImageClassifier`` and of ``GBRImageClassifier``, of tensors that are on the device already."""
        penalty = getattr(self.model, "gbr_penalty", None)
        if penalty is not None:
            inputs = inputs.detach().requires_grad_()
        logits = self.model(inputs, mode="tensor")
        loss = self.model.head.loss_module(logits, target, avg_factor=len(inputs))
        if penalty is None:
            return loss
        options = {"projections": penalty.projections, "generator": self._generator}
        return loss + penalty.weight * gbr_penalty(inputs, logits, **options)


def initial_network(cfg: Config) -> nn.Module:
    """The network of a config with the weights that the runner starts from, on the CPU."""
    model = build_model(cfg)
    model.init_weights()
    return model


@cache
def _shared_draws(seed: int, recipe: Recipe, sizes: tuple, torch_state: tuple, validated: tuple) -> Draws:
    return Draws(seed, recipe, list(sizes), torch.tensor(torch_state, dtype=torch.uint8), set(validated))
