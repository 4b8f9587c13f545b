"""What the collectives share: the short way of a plain call, the rules of their rows, the checks of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tpweave import env
from tpweave.dispatch import Inputs
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.native import DTYPE_CODES

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

# Codes of the dtypes that the native side adds.
SUM_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype != torch.bool}

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def direct(op: str, x: torch.Tensor, group: GroupLike, backend: str | None) -> TPGroup | None:
    """The group, if this call may go straight to its shm communicator.

    That is an eager call without a gradient on a plain, dense CPU tensor, with no backend forced. The table would
    choose the same row; torch.library's way there costs more than a small collective does.
    """
    if (
        torch.compiler.is_compiling()
        or backend is not None
        or type(x) not in _PLAIN
        or not x.is_cpu
        or not x.is_contiguous()
        or (x.requires_grad and torch.is_grad_enabled())
        or env.forced_backend(op) is not None
    ):
        return None
    found = resolve_group(group)
    return found if found.transport == "shm" else None


def local_objection(inputs: Inputs) -> str | None:
    """A rule of every `local` row, in which nothing travels."""
    size = 1 if inputs.group is None else inputs.group.size
    return None if size == 1 else f"needs a group of one rank, this has {size}"


def native_sum_objection(inputs: Inputs) -> str | None:
    """A rule of the `shm` rows that add numbers."""
    dtypes = {tensor.dtype for tensor in inputs.tensors}
    return next((f"does not add {str(d).removeprefix('torch.')}" for d in dtypes if d not in SUM_CODES), None)


def float_objection(inputs: Inputs) -> str | None:
    """A rule of the rows that add in fp32 on a GPU."""
    return None if all(tensor.is_floating_point() for tensor in inputs.tensors) else "adds floating-point numbers only"


def pg_objection(inputs: Inputs) -> str | None:
    """A rule of every `pg` row."""
    group: Any = inputs.group
    if group is None or group.size == 1:
        return "needs a group of several ranks"
    if group.backend == "gloo" and any(not tensor.is_cpu for tensor in inputs.tensors):
        return "gloo carries cpu tensors only"
    return None


def check_tensor(op: str, x: torch.Tensor) -> None:
    """Raises ValueError unless x is a dense (strided) tensor."""
    # Dynamo does not let a backward ask for the layout, and traces strided tensors only.
    if torch.compiler.is_compiling():
        return
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        raise ValueError(f"{op} takes a strided tensor, got {getattr(x, 'layout', type(x).__name__)}")
