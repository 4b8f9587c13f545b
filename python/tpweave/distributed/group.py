"""Groups of ranks: a `torch.distributed` process group, the transport its ranks agreed on, and a timeout.

    transport       where                           what carries a collective
    "none"          one rank                        nothing
    "shm"           CPU ranks of one host           one memory arena that all ranks map (`TPGroup.shm`)
    "hierarchical"  hosts with several ranks each   an arena on each host, torch.distributed between hosts
    "pg"            everything else                 torch.distributed

"hierarchical" is a way of the `pg` rows, for CPU tensors; see `tpweave.comm.hierarchical`.
The ranks agree on the transport once, over the process group, when the group is built: by trying it, never by host
names or LOCAL_WORLD_SIZE. Building a group is therefore a collective: all its ranks do it, in the same order.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Union

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tpweave import env
from tpweave.distributed.cost_model import CostModel
from tpweave.distributed.symmetric_memory import SymmetricBuffer, join
from tpweave.distributed.topology import Topology

_DISTRIBUTED = dist.is_available()

# How sums may travel between hosts.
COMPRESSIONS = ("int8",)

# What the public ops take as `group`.
GroupLike = Union["TPGroup", "dist.ProcessGroup", DeviceMesh, None]

# Launchers that set these started several processes, but torch.distributed needs more to join them.
_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "SLURM_STEP_NUM_TASKS": "srun"}
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TPGroup:
    """Ranks that share one model. Made by `tpweave.init`, not directly.

    Attributes:
        name: unique in the process and equal on all ranks; `TPGroup.by_name` finds the group again.
        rank: this process's rank in the group.
        size: number of ranks.
        ranks: the group's ranks as ranks of the world, in group order.
        process_group: the `torch.distributed` group; None for a lone process without torch.distributed.
        transport: "shm", "hierarchical", "pg" or "none", the same on all ranks.
        transport_reason: why it is not "shm", in words; None when it is.
        topology: which ranks share a host. Where that is not known, each has its own.
        compression: how sums travel over a kind of link, e.g. `{"inter_host": "int8"}`; empty: as they are.
        cost_model: what has been measured of the group's link and matmuls.
        shm: the native communicator of the "shm" transport, else None.
        failure: why no more collective runs over torch.distributed, in words; None while all is well.
        calling, calls: the last op that went over torch.distributed, and how many there have been.
        lent: (sequence of the call, tensor): memory of this rank that others may still read, see `lend`.
        symmetric_buffers: by channel; `tpweave.distributed.symmetric_memory.symmetric_buffer` fills it.
    """

    _by_name: dict[str, TPGroup] = {}  # noqa: RUF012
    _by_process_group: dict[Any, TPGroup] = {}  # noqa: RUF012

    def __init__(
        self, process_group: dist.ProcessGroup | None, timeout: float, compression: Mapping[str, str] | None = None
    ) -> None:
        self.process_group = process_group
        self.ranks: tuple[int, ...] = (0,)
        if process_group is None:
            self.rank, self.size = 0, 1
        else:
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
            self.ranks = tuple(dist.get_process_group_ranks(process_group))
        self._timeout = timeout
        base = "lone" if process_group is None else process_group.group_name
        # A rank may have built groups that others have not: the highest count is free on all.
        generation = max(self.all_gather_object(_generations.get(base, 0)))
        _generations[base] = generation + 1
        self.name = f"tp:{base}:{generation}"
        self.destroyed = False
        self.failure: str | None = None
        self.calling, self.calls = "nothing", 0
        self.lent: list[tuple[int, torch.Tensor]] = []
        self._lending = threading.Lock()
        self.symmetric_buffers: dict[str, SymmetricBuffer] = {}
        self.topology = Topology.flat(self.size, self.rank)
        self.transport_reason: str | None = "the group has one rank"
        if self.size > 1:
            self.topology, self.transport_reason = join(self)
        one_host = len(self.topology.hosts) == 1
        self.shm: Any = self.topology.shm if one_host else None
        if one_host:
            self.transport = "none" if self.size == 1 else "shm"
        else:
            self.transport = "pg" if self.topology.is_flat else "hierarchical"
        self.cost_model = CostModel()
        self.compression: dict[str, str] = {}
        if self.size > 1 and len(set(self.all_gather_object(repr(compression)))) > 1:
            raise ValueError(f"the ranks gave different compressions, this one {compression}")
        self.compression.update(compression or {})
        _groups.add(self)
        TPGroup._by_name[self.name] = self
        TPGroup._by_process_group[process_group] = self

    @staticmethod
    def by_name(name: str) -> TPGroup:
        """The group called `name`. Raises ValueError when there is none (it may have been destroyed)."""
        try:
            return TPGroup._by_name[name]
        except KeyError:
            known = ", ".join(TPGroup._by_name) or "none"
            raise ValueError(f"no group named '{name}' in this process; there are: {known}") from None

    @property
    def timeout(self) -> float:
        """Seconds that a collective waits for a late rank."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = _checked_timeout(seconds)
        if self.topology.shm is not None:
            self.topology.shm.set_timeout(self._timeout)

    @property
    def between_hosts(self) -> Topology:
        """The topology as the `pg` rows see it: on "shm" and "pg" each rank is on its own there."""
        return self.topology if self.transport == "hierarchical" else Topology.flat(self.size, self.rank)

    @property
    def backend(self) -> str | None:
        """torch.distributed's name of what carries the process group, e.g. "gloo"; None for a lone process."""
        return None if self.process_group is None else dist.get_backend(self.process_group)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of shared memory that the group's transport holds, for all ranks of this host together."""
        return 0 if self.topology.shm is None else self.topology.shm.workspace_bytes

    @property
    def poisoned(self) -> bool:
        """Whether an earlier failure made the group unusable; `tpweave.init` builds a new one."""
        shm = self.topology.shm
        return self.failure is not None or (shm is not None and shm.poisoned)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised CPU tensor that collectives of this group need not copy for their peers to read.

        On the "shm" transport it lies in the memory that the ranks share, elsewhere it is an ordinary one. No
        collective: each rank makes its tensors when it likes. The memory is kept for the group's next tensors when the
        tensor dies.

        Args:
            shape: its sizes.
            dtype: its dtype.

        Raises:
            GroupPoisonedError: the group was destroyed, or belongs to the process that this one was forked from.

        Example:
            >>> partial = group.empty((4, 4096), torch.bfloat16)
            >>> torch.mm(a, b, out=partial)
            >>> tpweave.all_reduce_(partial, group)
        """
        numel = math.prod(shape)
        if self.shm is None or numel == 0:
            return torch.empty(*shape, dtype=dtype)
        block = self.shm.allocate(numel * dtype.itemsize)
        return torch.frombuffer(block, dtype=dtype, count=numel).view(*shape)

    def lend(self, sequence: int, tensor: torch.Tensor) -> None:
        """Keep a tensor of `empty` that peers may read after this rank has left the call of number `sequence`.

        Everybody's arrival at that call proves that all ranks have left the earlier ones: their tensors are let go.
        """
        with self._lending:
            self.lent = [(number, kept) for number, kept in self.lent if number >= sequence]
            self.lent.append((sequence, tensor))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, over torch.distributed: for agreeing on facts, not for speed."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def destroy(self) -> None:
        """Give back what the group holds. Ranks that still wait for this one raise `PeerFailureError`."""
        if self.destroyed:
            return
        self.destroyed = True
        self.symmetric_buffers.clear()
        self.lent.clear()
        # The closed communicator stays: a call on it says that the group was destroyed.
        if self.topology.shm is not None:
            self.topology.shm.close()
        del TPGroup._by_name[self.name]
        if TPGroup._by_process_group.get(self.process_group) is self:
            del TPGroup._by_process_group[self.process_group]

    def __repr__(self) -> str:
        return f"TPGroup({self.name!r}, rank={self.rank}, size={self.size}, transport={self.transport!r})"


_generations: dict[str, int] = {}
_groups: weakref.WeakSet[TPGroup] = weakref.WeakSet()


@atexit.register
def _release_groups() -> None:
    """Let go of every process group while the interpreter stands.

    One that lives on into the destruction of static objects aborts the process: gloo's threads are gone by then. So
    groups that were destroyed, but that somebody still holds, are let go of too.
    """
    for group in list(_groups):
        group.destroy()
        group.process_group = None


def init(
    group: GroupLike = None, *, timeout: float | None = None, compression: Mapping[str, str] | None = None
) -> TPGroup:
    """The `TPGroup` of some ranks, built when it does not exist yet. All ranks of the group must call this.

    Without arguments this is the default group, which ops use for `group=None`: all ranks of `torch.distributed`,
    which is initialised first when torchrun started the process. In a process on its own it is a group of one.
    A group that failed (`TPGroup.poisoned`) is replaced by a new one on the same ranks.

    Args:
        group: None, a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        timeout: seconds that a collective waits for a late rank (None: TPWEAVE_TIMEOUT, default 300).
        compression: `{"inter_host": "int8"}` lets sums travel between hosts as int8 blocks, with the error that
            `tpweave.comm.compression` states; `{}` turns it off; the same on all ranks. None: as the group has it, off
            where it is new. Ranks whose hosts are not known (transport "pg") count as one host each.

    Returns:
        the group.

    Raises:
        ValueError: this process is not in the group, the mesh has more than one dimension, the timeout is not positive,
            no such compression.
        RuntimeError: several processes were started, but not so that torch.distributed can join them.

    Example:
        >>> group = tpweave.init(timeout=60)
    """
    seconds = None if timeout is None else _checked_timeout(timeout)
    if compression is not None:
        _check_compression(compression)
    if isinstance(group, TPGroup):
        existing: TPGroup | None = group
        process_group = group.process_group
    else:
        process_group = _process_group(group)
        existing = TPGroup._by_process_group.get(process_group)
    if existing is not None and not existing.destroyed:
        if not existing.poisoned:
            if seconds is not None:
                existing.timeout = seconds
            if compression is not None:
                # A copy: calls that are under way in another thread keep theirs.
                existing.compression = dict(compression)
            return existing
        compression = existing.compression if compression is None else compression
        existing.destroy()
    return TPGroup(process_group, env.timeout_seconds() if seconds is None else seconds, compression)


def resolve_group(group: GroupLike = None) -> TPGroup:
    """What an op's `group` argument means. Builds the `TPGroup` on first use.

    A destroyed or failed group is returned as it is: the call that uses it raises.
    """
    if isinstance(group, TPGroup):
        return group
    # The default group first, by the short way: small collectives live by their call's overhead.
    world = dist.group.WORLD if group is None and _DISTRIBUTED else None
    found = None if world is None else TPGroup._by_process_group.get(world)
    if found is not None:
        return found
    found = TPGroup._by_process_group.get(_process_group(group))
    return found if found is not None else init(group)


def _process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group meant; None means a lone process."""
    if group is None:
        if not _DISTRIBUTED:
            return None
        world = dist.group.WORLD
        return world if world is not None else _join_world()
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names: tuple[str | int, ...] = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(
                f"a group is one dimension of a DeviceMesh, this one has {group.ndim}: {names}; "
                f"pass e.g. mesh[{names[-1]!r}]"
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this process (rank {dist.get_rank()} of the world) is not in the group")
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise ValueError(f"group must be None, a TPGroup, a ProcessGroup or a 1-D DeviceMesh, not {kind}")
    return group


def _join_world() -> dist.ProcessGroup | None:
    """Initialise torch.distributed from torchrun's environment; None when nobody else was started."""
    present = [name for name in _TORCHRUN_VARIABLES if os.environ.get(name)]
    if len(present) == len(_TORCHRUN_VARIABLES):
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return dist.group.WORLD
    if "WORLD_SIZE" in present and os.environ["WORLD_SIZE"] != "1":
        missing = ", ".join(name for name in _TORCHRUN_VARIABLES if name not in present)
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed cannot be initialised: "
            f"not set: {missing}. Start the processes with torchrun, or call init_process_group first."
        )
    for name, launcher in _OTHER_LAUNCHERS.items():
        if os.environ.get(name, "1") != "1":
            raise RuntimeError(
                f"{launcher} started {os.environ[name]} processes ({name}), but torch.distributed is not initialised. "
                "Call torch.distributed.init_process_group first, or start the processes with torchrun."
            )
    return None


def _check_compression(compression: Mapping[str, str]) -> None:
    for link, form in compression.items():
        if link != "inter_host" or form not in COMPRESSIONS:
            raise ValueError(
                f"compression is {dict(compression)}; it takes {{'inter_host': form}} with one of {COMPRESSIONS}"
            )


def _checked_timeout(seconds: float) -> float:
    if not seconds > 0:
        raise ValueError(f"timeout is {seconds}; it must be more than 0 seconds")
    return float(seconds)
