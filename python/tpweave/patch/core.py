"""`parallelize` and `restore`: swapping the layers of one model, and swapping them back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpweave.distributed.group import GroupLike, TPGroup, resolve_group
from tpweave.errors import UnsupportedModelError
from tpweave.layers.sharding import ShardedModule
from tpweave.patch import hf
from tpweave.patch.families import FAMILIES
from tpweave.patch.family import Family
from tpweave.patch.plan import Plan, Planner, Swap
from tpweave.patch.report import ADJUSTED, KEPT, SWAPPED, SwapEntry, SwapReport

_STATE = "_tpweave_swapped"
_SAMPLES = 1024


@dataclass
class _Undo:
    """What `restore` needs.

    Attributes:
        swaps: the replaced modules; the originals hold no storage for parameters that were divided.
        attributes: (module, name, value before, or `_ABSENT`).
        handles: of the hooks.
        configs: (module, its config before).
    """

    swaps: list[Swap]
    attributes: list[tuple[nn.Module, str, Any]]
    handles: list[Any]
    configs: list[tuple[nn.Module, Any]]


_ABSENT = object()


def parallelize(
    model: nn.Module, group: GroupLike = None, *, attention: bool = True, shares: Sequence[float] | None = None,
    strict: bool = False,
) -> SwapReport:  # fmt: skip
    """Make `model` run on all ranks of `group` together, in place: each rank keeps its part of every large layer.

    Call it on every rank with the same model (same weights, built or loaded from the same seed or files). Outputs,
    losses and generated tokens are then the same on all ranks. Only this instance is changed, and nothing before all
    checks passed. Parameters keep the checkpoint's names; those of divided layers are new `nn.Parameter`s that hold
    this rank's part, so build the optimizer afterwards. Until `restore(model)`, `state_dict()` holds this rank's parts.
    In training, seed torch alike on all ranks, or dropout outside the divided layers would differ between them.

    Args:
        model: a Transformers model of a known family: BERT, Llama, Mistral, Qwen2, Qwen3.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        attention: run attention through `tpweave.attention`; False keeps the model's attention function.
        shares: work per rank, e.g. `[3, 1]` gives rank 0 three times the heads, columns and tokens of rank 1.
        strict: raise when a module that the family's table names has to be left alone.

    Returns:
        a `SwapReport` that lists every module.

    Raises:
        UnsupportedModelError: an unknown family, a model that is parallel already, or a refusal under `strict`.
        ValueError: shares that do not fit, or ranks with different weights.

    Example:
        >>> model = AutoModel.from_pretrained("all-MiniLM-L6-v2")
        >>> print(tpweave.parallelize(model))
        >>> hidden = model(**tokens).last_hidden_state
    """
    found = resolve_group(group)
    try:
        family = _family_of(model)
        plan = _checked_plan(model, family, found, attention, shares, strict)
    except ValueError as error:
        _agree(model, found, error)
        raise
    _agree(model, found, None)
    entries = _entries(model, family, plan)
    _commit(model, plan, attention)
    return SwapReport(family.name, found.rank, found.size, entries)


def restore(model: nn.Module) -> None:
    """Undo `parallelize(model)`: the original modules with full weights, as trained in between. All ranks must call it.

    Weights that were not trained come back bit for bit. Parameters that were divided are new `nn.Parameter`s, without
    gradients.

    Raises:
        ValueError: `parallelize` was not called on this model.

    Example:
        >>> tpweave.parallelize(model)
        >>> train(model)
        >>> tpweave.restore(model)
        >>> model.save_pretrained("trained")
    """
    undo: _Undo | None = model.__dict__.get(_STATE)
    if undo is None:
        raise ValueError(f"this {type(model).__name__} is not parallel: restore takes what parallelize was called on")
    # All weights are gathered before anything changes: a rank that fails meanwhile leaves the model as it was.
    parts = [pair for swap in undo.swaps for pair in swap.parts]
    full: dict[int, nn.Parameter] = {}
    for _, sharded in parts:
        for name, part in sharded.named_parameters(recurse=False):
            if id(part) not in full:
                full[id(part)] = nn.Parameter(sharded.full_parameter(name), requires_grad=part.requires_grad)
    for original, sharded in parts:
        for name, part in sharded.named_parameters(recurse=False):
            setattr(original, name, full[id(part)])
    for module, name, before in reversed(undo.attributes):
        if isinstance(before, nn.Parameter):
            before = full[id(getattr(module, name))]
        if before is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, before)
    for swap in reversed(undo.swaps):
        if not swap.parts:
            for name, parameter in swap.replacement.named_parameters(recurse=False):
                setattr(swap.original, name, parameter)
        swap.original.train(swap.replacement.training)
        _set_module(model, swap.path, swap.original)
    for handle in undo.handles:
        handle.remove()
    for module, config in undo.configs:
        module.config = config
    del model.__dict__[_STATE]


def _family_of(model: nn.Module) -> Family:
    for path, module in model.named_modules():
        if _STATE in module.__dict__ or isinstance(module, ShardedModule):
            where = f"its part '{path}' is" if path else "it is"
            raise UnsupportedModelError(f"{type(model).__name__}: {where} parallel already; call tpweave.restore first")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        seen = f"{type(model).__module__}.{type(model).__name__}"
        what = f"of model type '{kind}'" if kind else "without a Transformers config"
        raise UnsupportedModelError(f"no table for {seen}, {what}; known model types: {', '.join(FAMILIES)}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(f"parameter '{name}' is on the meta device: load the weights first")
    return FAMILIES[kind]


def _checked_plan(
    model: nn.Module, family: Family, group: TPGroup, attention: bool, shares: Sequence[float] | None, strict: bool
) -> Plan:
    if attention:
        hf.register_attention()
    plan = Planner(model, family, group, shares, any_head_map=attention).make()
    if not plan.swaps:
        raise UnsupportedModelError(f"{type(model).__name__}: nothing in it matches the table of {family.name}")
    if strict and plan.refused:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in plan.refused.items())
        raise UnsupportedModelError(f"{type(model).__name__}, strict: {reasons}")
    return plan


def _agree(model: nn.Module, group: TPGroup, problem: ValueError | None) -> None:
    """Raise on the other ranks when one has a problem, and on all when they hold different models."""
    digests = {} if problem is not None else {name: _digest(p) for name, p in model.named_parameters()}
    answers = group.all_gather_object((None if problem is None else f"{type(problem).__name__}: {problem}", digests))
    if problem is not None:
        return
    for rank, (text, _) in enumerate(answers):
        if text is not None:
            raise UnsupportedModelError(f"rank {rank} cannot parallelize its model: {text}")
    for rank, (_, theirs) in enumerate(answers):
        for name in {**digests, **theirs}:
            if digests.get(name) != theirs.get(name):
                raise ValueError(
                    f"ranks {group.rank} and {rank} hold different models: parameter '{name}' differs in shape, dtype "
                    "or values. Load the same weights on all ranks, or seed torch alike before building the model."
                )


def _digest(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Shape, dtype and a hash of up to 1024 values spread over the parameter."""
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous().view(torch.uint8)
    digest = hashlib.sha256(bytes(sample.numpy())).hexdigest()[:16]
    return tuple(parameter.shape), str(parameter.dtype), digest


def _entries(model: nn.Module, family: Family, plan: Plan) -> tuple[SwapEntry, ...]:
    swaps = {swap.path: swap for swap in plan.swaps}
    entries = []
    for path, module in model.named_modules(remove_duplicate=False):
        name = type(module).__name__
        if path in swaps:
            entries.append(SwapEntry(path, name, SWAPPED, type(swaps[path].replacement).__name__, swaps[path].note))
        elif path in plan.adjusted:
            entries.append(SwapEntry(path, name, ADJUSTED, None, plan.adjusted[path]))
        elif any(path.startswith(f"{whole.path}.") for whole in plan.swaps):
            entries.append(SwapEntry(path, name, SWAPPED, None, "with the module above"))
        else:
            entries.append(SwapEntry(path, name, KEPT, None, _why_kept(path, module, family, plan)))
    return tuple(entries)


def _why_kept(path: str, module: nn.Module, family: Family, plan: Plan) -> str:
    if path in plan.refused:
        return f"cannot be swapped: {plan.refused[path]}"
    if next(module.children(), None) is not None:
        return "its parts are listed below"
    if next(module.parameters(), None) is None:
        return "no parameters"
    for refused in plan.refused:
        if path.startswith(f"{refused}."):
            return f"left whole like {refused}, of which it is a part"
    return family.reasons.get(type(module).__name__, f"not in the table of {family.name}: every rank computes it")


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _commit(model: nn.Module, plan: Plan, attention: bool) -> None:
    undo = _Undo(plan.swaps, [], [], [])
    for module, name, value in plan.attributes:
        undo.attributes.append((module, name, getattr(module, name, _ABSENT)))
        setattr(module, name, value)
    for module, hook in plan.hooks:
        undo.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for swap in plan.swaps:
        swap.replacement.train(swap.original.training)
        _set_module(model, swap.path, swap.replacement)
        for original, _ in swap.parts:
            for name, parameter in list(original.named_parameters(recurse=False)):
                # The whole weight is not needed until restore, which makes it anew: give back its memory.
                setattr(original, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    if attention:
        undo.configs = hf.use_attention(model)
    model.__dict__[_STATE] = undo
