"""Chunk k travels while chunk k+1 is multiplied.

    with carrier(group, device) as submit:
        arriving = [submit(sum_everywhere, multiply(k), group) for k in range(chunks)]
        results = [chunk.result() for chunk in arriving]

On the CPU one further thread carries the chunks, in the order in which they were submitted: torch's matmuls and gloo's
waits both run without Python's lock. On a GPU they are enqueued on a stream beside the current one. How many chunks:
`cost_model.CostModel.chunks`. While the block lasts, the group belongs to the carrier: the caller only multiplies.

Source: the decomposition of Wang et al., "Overlap Communication with Dependent Computation via Decomposition", 2023.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tpweave.distributed.supervision import abandon

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


class Arriving(Protocol):
    """What `submit` gives."""

    def result(self) -> Any:
        """What the function returned, as soon as it has; raises what it raised."""


class Submit(Protocol):
    """Starts `carry(*args)` after all that was submitted before."""

    def __call__(self, carry: Callable[..., Any], *args: Any) -> Arriving: ...


@contextlib.contextmanager
def carrier(group: TPGroup, device: torch.device) -> Iterator[Submit]:
    """What carries chunks for the length of the block. All ranks submit the same calls in the same order.

    An exception in the block leaves this rank out of step with the others: the group cannot be used any more then, and
    the other ranks raise too.
    """
    try:
        with _streamed(device) if device.type == "cuda" else _threaded() as submit:
            yield submit
    except BaseException as error:
        abandon(group, f"{type(error).__name__} on rank {group.rank} between the chunks of a pipeline")
        raise


@contextlib.contextmanager
def _threaded() -> Iterator[Submit]:
    inference = torch.is_inference_mode_enabled()

    def run(carry: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # Both are settings of a thread.
        with torch.inference_mode(inference), torch.no_grad():
            return carry(*args)

    pool = ThreadPoolExecutor(1, thread_name_prefix="tpweave-carrier")
    try:
        yield lambda carry, *args: pool.submit(run, carry, args)
    except BaseException:
        # What is on its way ends with the group; nobody waits for it here.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


class _Enqueued:
    """A result on the carrier's stream, with what it was made from: memory that the stream may still read."""

    def __init__(self, stream: torch.cuda.Stream, carry: Callable[..., Any], args: tuple[Any, ...]) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self.value = carry(*args)
            self.done = stream.record_event()
        self.stream, self.args = stream, args

    def result(self) -> Any:
        torch.cuda.current_stream(self.stream.device).wait_event(self.done)
        return self.value


@contextlib.contextmanager
def _streamed(device: torch.device) -> Iterator[Submit]:
    stream = torch.cuda.Stream(device)
    enqueued: list[_Enqueued] = []

    def submit(carry: Callable[..., Any], *args: Any) -> Arriving:
        enqueued.append(_Enqueued(stream, carry, args))
        return enqueued[-1]

    yield submit
    # What was made on either stream may be freed from here on.
    torch.cuda.current_stream(device).wait_stream(stream)
