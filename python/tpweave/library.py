"""The `torch.ops.tpweave` namespace: one call registers an op with its fake and its gradient.

`torch.library.Library` is used directly: `torch.library.custom_op` costs 12 us a call against 4 us (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

LIBRARY = torch.library.Library("tpweave", "DEF")

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Arguments that hold no tensor.
_VALUES = frozenset((type(None), bool, int, float, str))

_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_get_tracing_state = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad


def _is_watched() -> bool:
    """Whether torch.compile, tracing, torch.func or a dispatch mode wants to see which ops run."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _forward_ad._current_level >= 0
    )


def is_plain_call(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors may run an op's implementation without going through torch.library.

    That is an eager call, of which nothing (autograd, torch.compile, tracing, torch.func, a dispatch mode, a tensor
    subclass) wants to know. The way through torch.library costs more than a norm of a few rows does.
    """
    if _is_watched():
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (recording and tensor.requires_grad)):
            return False
    return True


class RegisteredOp:
    """An op of `torch.ops.tpweave`; calling it takes the shortest way that nobody can tell from torch.library's.

    A plain eager call (`is_plain_call`) runs the implementation. Where only autograd wants to know, an
    `autograd.Function` with the same gradient records it: `torch.library.register_autograd` costs 70 us more for a norm
    of one row (measured on Zen 3). Everything else, and ops that write to their arguments, go through torch.library.

    Attributes:
        overload: `torch.ops.tpweave.<name>.default`.
    """

    def __init__(
        self,
        overload: Any,
        impl: Callable[..., Any],
        backward: Callable[..., Any] | None,
        setup_context: Callable[..., Any] | None,
    ) -> None:
        self.overload = overload
        self._impl = impl
        # autograd.Function does not look into lists that are returned.
        lists = any(isinstance(returned.type, torch.ListType) for returned in overload._schema.returns)
        self._record = None if backward is None or lists else _recorder(overload, impl, backward, setup_context)
        self._mutates = overload._schema.is_mutable

    def __call__(self, *args: Any) -> Any:
        if self._mutates or _is_watched():
            return self.overload(*args)
        recording, record = torch.is_grad_enabled(), False
        for arg in args:
            kind = type(arg)
            if kind in _PLAIN and not arg.is_meta:
                record = record or (recording and arg.requires_grad)
            elif kind not in _VALUES:
                return self.overload(*args)
        if not record:
            return self._impl(*args)
        return self.overload(*args) if self._record is None else self._record(*args)


def _recorder(
    overload: Any, impl: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any] | None
) -> Callable[..., Any]:
    """What runs `impl` and records `backward`, from the functions that torch.library.register_autograd takes."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = impl(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    name = overload._schema.name.rpartition("::")[2]
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return function.apply


def register_op(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> RegisteredOp:
    """Define `torch.ops.tpweave.<name>`.

    Args:
        schema: e.g. `"rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)"`.
        impl: the eager implementation, for every device.
        fake: shapes and dtypes only, for torch.compile and meta tensors.
        backward: as in `torch.library.register_autograd`; None makes the op non-differentiable.
        setup_context: likewise.

    Returns:
        the op, ready to call with positional arguments.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tpweave::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"tpweave::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return RegisteredOp(getattr(torch.ops.tpweave, name).default, impl, backward, setup_context)
