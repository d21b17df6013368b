"""Trials before training: whether a batch of one can be normalised, and the gradient penalty be differentiated."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_world_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ..convert import enc_layers
from .pipelines import sample_of
from .untouched import recomputed, untouched


def check_batches(loader: DataLoader, model: nn.Module, steps: int | None = None) -> None:
    """Refuse a training loader without a batch, or with a batch of one where a batch norm gets one value per channel.

    A training sample runs through the network to find these batch norms. Every rank has to call it.

    Args:
        loader: Of the training data.
        model: The model, not wrapped.
        steps: How many batches will be drawn; None: whole epochs.

    Raises:
        ValueError: If there is such a batch on any rank.
    """
    # Samplers may leave the ranks with different numbers of samples.
    found = [pair for pair in all_gather_object(_samples_and_size(loader)) if pair is not None]
    drop_last = getattr(loader.batch_sampler, "drop_last", False)
    for count, size in found:
        if drop_last and count < size:
            raise ValueError(
                f"batch_size: expected at most the {count} samples that a process has, got {size}; with drop_last=True "
                "there is no batch to train on"
            )
    for count, size in found:
        reaches_end = steps is None or steps * size >= count
        if size > 1 and (drop_last or count % size != 1 or not reaches_end):
            continue
        norms = norms_of_single_values(loader, model)
        if norms:
            raise ValueError(
                f"train_dataloader: {count} samples in batches of {size} leave a batch of one, over which "
                f"{_cannot_normalise(norms, model)}; set drop_last=True in train_dataloader, "
                f"{'a larger' if size == 1 else 'another'} batch_size, or enc=dict(post_norm=False)"
            )
        return


def norms_of_single_values(loader: DataLoader, model: nn.Module) -> list[str]:
    """Names of the batch norms that get one value per channel when they train on a batch of one."""
    names, found = {}, []

    def look(norm: nn.Module, args: tuple) -> None:
        if args[0].numel() == args[0].shape[1] and names[norm] not in found:
            found.append(names[norm])

    with untouched(model):
        model.train()  # those of frozen stages stay in eval mode
        for name, module in model.named_modules():
            alone = not isinstance(module, nn.SyncBatchNorm) or get_world_size() == 1
            if isinstance(module, _BatchNorm) and module.training and alone:
                names[module] = name
        handles = [norm.register_forward_pre_hook(look) for norm in names]
        for norm in names:
            norm.eval()  # it takes a single value then
        try:
            model.forward(**_batch(loader, model, 1), mode="loss")  # no step yet for hooks of the whole
        except Exception:  # the norms that it reached count; what else is wrong is not the matter here
            pass
        finally:
            for handle in handles:
                handle.remove()
    return found


def check_penalty(loader: DataLoader, model: nn.Module, compiles: bool) -> None:
    """Raise if gradients cannot be differentiated, which a GBR penalty does; a trial on two training samples tells.

    Args:
        loader: Of the training data.
        model: The model, not wrapped; without ``gbr_penalty`` nothing is tried. Every rank has to call it.
        compiles: Whether the run compiles the model.

    Raises:
        ValueError: If it cannot train; the other option at fault is named.
    """
    penalty = getattr(model, "gbr_penalty", None)
    if penalty is None:
        return
    start = "gbr_penalty: the penalty differentiates gradients, which"
    if compiles:
        raise ValueError(f"{start} torch.compile cannot; leave compile out of the config, or gbr_penalty")
    names = recomputed(model)
    if names:
        raise ValueError(
            f"{start} activation checkpointing cannot; turn it off in {names[0] or 'the model'!r} (with_cp, "
            "grad_checkpointing, activation_checkpointing), or leave gbr_penalty out"
        )
    with untouched(model), torch.enable_grad():
        model.train()
        error = None
        try:
            batch = _batch(loader, model, 2)
            model.gbr_penalty = None
            model.forward(**batch, mode="loss")
        except Exception:  # not for the penalty's sake
            return
        finally:
            model.gbr_penalty = penalty
        try:
            loss = model.forward(**batch, mode="loss")["loss_gbr"]
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        except RuntimeError as caught:
            error = caught
    if error is not None:
        raise ValueError(
            f"{start} a part of this model cannot ({str(error).splitlines()[0]}); in modules of your own, leave out "
            "torch.utils.checkpoint (or set use_reentrant=False) and torch.compile, or leave gbr_penalty out"
        ) from error


def _samples_and_size(loader: DataLoader) -> tuple[int, int] | None:
    """Samples of this process in an epoch, and the batch size; None where samplers do not tell."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    try:
        count = len(loader.sampler)
    except TypeError:  # a dataset that is a stream
        return None
    if size is None or not count:
        return None
    # An endless sampler has no last batch, and so batches of one size.
    return (count * size if isinstance(loader.sampler, InfiniteSampler) else count), size


def _cannot_normalise(norms: list[str], model: nn.Module) -> str:
    own = {f"{name}.norm" if name else "norm": name for name, layer in enc_layers(model) if layer.enc_norm is not None}
    more = f" (and {len(norms) - 1} more)" if len(norms) > 1 else ""
    if norms[0] in own:
        return f"{own[norms[0]]!r}{more} cannot normalise (an ENC layer that has a batch norm of its own, post_norm)"
    return f"batch norm {norms[0]!r}{more} cannot normalise (one value per channel)"


def _batch(loader: DataLoader, model: nn.Module, size: int) -> dict[str, Any]:
    samples = [sample_of(loader.dataset, index % len(loader.dataset)) for index in range(size)]
    return model.data_preprocessor(loader.collate_fn(samples), True)


def learns_nothing(head: nn.Module) -> bool:
    """Whether the loss of a head of one output gives it no gradient, as the softmax of one output does."""
    logits = torch.tensor([[0.0], [2.0]], requires_grad=True)
    try:
        with torch.enable_grad():
            loss = head.loss_module(logits, torch.zeros(2, dtype=torch.long))
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
    except Exception:  # a head or a loss of another kind
        return False
    return isinstance(gradient, Tensor) and not gradient.any()
