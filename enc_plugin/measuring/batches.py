"""Checks before training on one batch: batch norms with batches of one, and second derivatives for the GBR penalty."""

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
    """Raise ``ValueError`` if any rank has no training batch, or one in which a batch norm gets one value per channel.

    One training sample runs through the network to find these batch norms. All ranks must call it.

    Args:
        loader: Training data loader.
        model: The model, not wrapped.
        steps: Number of batches that will be drawn; None: whole epochs.
    """
    # With some samplers, the ranks have different numbers of samples.
    found = [pair for pair in all_gather_object(_samples_and_size(loader)) if pair is not None]
    drop_last = getattr(loader.batch_sampler, "drop_last", False)
    for count, size in found:
        if drop_last and count < size:
            raise ValueError(
                f"batch_size: expected at most {count}, the number of samples of a process, got {size}; with "
                "drop_last=True no batch is left, so use a smaller batch_size or drop_last=False"
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
    """Names of the batch norms that get one value per channel when training with a batch of one."""
    names, found = {}, []

    def look(norm: nn.Module, args: tuple) -> None:
        if args[0].numel() == args[0].shape[1] and names[norm] not in found:
            found.append(names[norm])

    with untouched(model):
        model.train()  # batch norms of frozen stages stay in eval mode
        for name, module in model.named_modules():
            alone = not isinstance(module, nn.SyncBatchNorm) or get_world_size() == 1
            if isinstance(module, _BatchNorm) and module.training and alone:
                names[module] = name
        handles = [norm.register_forward_pre_hook(look) for norm in names]
        for norm in names:
            norm.eval()  # in train mode, a single value would raise
        try:
            model.forward(**_batch(loader, model, 1), mode="loss")  # not model(...), which would run its hooks
        except Exception:  # other errors are reported elsewhere; the norms that ran before count
            pass
        finally:
            for handle in handles:
                handle.remove()
    return found


def check_penalty(loader: DataLoader, model: nn.Module, compiles: bool) -> None:
    """Raise ``ValueError`` if a model with a GBR penalty cannot differentiate its gradients.

    It is tested on two training samples. All ranks must call it.

    Args:
        loader: Training data loader.
        model: The model, not wrapped; without ``gbr_penalty`` nothing is tested.
        compiles: Whether the run compiles the model.
    """
    penalty = getattr(model, "gbr_penalty", None)
    if penalty is None:
        return
    start = "gbr_penalty: the penalty differentiates gradients, which"
    if compiles:
        raise ValueError(f"{start} torch.compile does not support; leave compile or gbr_penalty out of the config")
    names = recomputed(model)
    if names:
        raise ValueError(
            f"{start} activation checkpointing does not support; turn it off in {names[0] or 'the model'!r} (with_cp, "
            "grad_checkpointing, activation_checkpointing), or leave gbr_penalty out"
        )
    with untouched(model), torch.enable_grad():
        model.train()
        error = None
        try:
            batch = _batch(loader, model, 2)
            model.gbr_penalty = None
            model.forward(**batch, mode="loss")
        except Exception:  # it fails without the penalty too, which is reported elsewhere
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
            f"{start} a part of this model does not support ({str(error).splitlines()[0]}); do not use torch.compile "
            "or torch.utils.checkpoint (without use_reentrant=False) in your modules, or leave gbr_penalty out"
        ) from error


def _samples_and_size(loader: DataLoader) -> tuple[int, int] | None:
    """Number of samples of this process in an epoch, and the batch size; None if the samplers do not tell."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    try:
        count = len(loader.sampler)
    except TypeError:  # an iterable dataset
        return None
    if size is None or not count:
        return None
    # An infinite sampler has no incomplete last batch.
    return (count * size if isinstance(loader.sampler, InfiniteSampler) else count), size


def _cannot_normalise(norms: list[str], model: nn.Module) -> str:
    own = {f"{name}.norm" if name else "norm": name for name, layer in enc_layers(model) if layer.enc_norm is not None}
    more = f" (and {len(norms) - 1} more)" if len(norms) > 1 else ""
    if norms[0] in own:
        return f"{own[norms[0]]!r}{more} cannot normalise (an ENC layer with an added batch norm, post_norm)"
    return f"batch norm {norms[0]!r}{more} cannot normalise (one value per channel)"


def _batch(loader: DataLoader, model: nn.Module, size: int) -> dict[str, Any]:
    samples = [sample_of(loader.dataset, index % len(loader.dataset)) for index in range(size)]
    return model.data_preprocessor(loader.collate_fn(samples), True)


def learns_nothing(head: nn.Module) -> bool:
    """Whether the loss of a head with one output has no gradient, as the softmax of one output has none."""
    logits = torch.tensor([[0.0], [2.0]], requires_grad=True)
    try:
        with torch.enable_grad():
            loss = head.loss_module(logits, torch.zeros(2, dtype=torch.long))
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
    except Exception:  # another kind of head or loss
        return False
    return isinstance(gradient, Tensor) and not gradient.any()
