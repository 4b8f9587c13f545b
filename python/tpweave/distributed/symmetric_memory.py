"""Memory that the ranks of one host share: how they come to hold it, and buffers in it for kernels.

Same host means: a socket in the machine's abstract name space connects, and what comes through it maps and begins with
the group's nonce. Rank 0 makes the memory (an anonymous file, mode 0600) and hands its descriptor to each rank over
that rank's socket. Both ends of a socket check that the other runs as the same user. The sockets are kept: one that
hangs up is a rank that ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpweave import env
from tpweave.distributed.topology import Topology, hosts_of
from tpweave.native import _C

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

_TOKEN_BYTES = 16


@dataclass
class Member:
    """What a rank tells the others before they try to share memory."""

    token: bytes
    cores: frozenset[int]
    reason: str | None


class Rendezvous:
    """One rank's part in building the shared arena: `listen`, exchange members, `connect`, `accept`, `share`.

    Between the steps the ranks agree, over the process group, whether all have succeeded: `connect_group` does.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.token = os.urandom(_TOKEN_BYTES)
        self.listener: socket.socket | None = None
        self.sockets: dict[int, socket.socket] = {}
        self.reached: set[int] = set()

    def listen(self) -> None:
        """Raises OSError or RuntimeError when this rank cannot take part."""
        if sys.platform != "linux":
            raise RuntimeError(f"needs Linux, this is {sys.platform}")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(_address(self.token))
        self.listener.listen(self.size)

    def connect(self, tokens: list[bytes]) -> None:
        """Connect to every lower rank. Succeeds without its help: it accepts later.

        Tries them all before it raises: `reached` are those that answered.
        """
        failures = []
        for peer in range(self.rank):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sockets[peer] = link
            try:
                link.connect(_address(tokens[peer]))
                self._check_user(link, peer)
                link.sendall(self.token)
                self.reached.add(peer)
            except OSError as error:
                failures.append(f"cannot reach rank {peer} on this host ({error.strerror})")
            except RuntimeError as error:
                failures.append(str(error))
        if failures:
            raise RuntimeError(failures[0])
        if self.size > _C.SHM_MAX_RANKS:
            raise RuntimeError(f"takes up to {_C.SHM_MAX_RANKS} ranks, the group has {self.size}")

    def accept(self, tokens: list[bytes], timeout: float) -> None:
        """Accept every higher rank; strangers that found the socket are turned away."""
        assert self.listener is not None
        expected = {tokens[peer]: peer for peer in range(self.rank + 1, self.size)}
        deadline = time.monotonic() + timeout
        while expected:
            self.listener.settimeout(max(0.001, deadline - time.monotonic()))
            link, _ = self.listener.accept()
            link.settimeout(max(0.001, deadline - time.monotonic()))
            peer = None
            # A stranger may close or send nothing: only the deadline of all matters.
            with contextlib.suppress(OSError):
                if _peer(link)[1] == os.geteuid():
                    peer = expected.pop(link.recv(_TOKEN_BYTES, socket.MSG_WAITALL), None)
            if peer is None:
                link.close()
                continue
            link.settimeout(None)
            self.sockets[peer] = link
        self.listener.close()
        self.listener = None

    def share(self, nonce: bytes, cores: int, timeout: float) -> Any:
        """Pass the arena from rank 0 to all, and map it.

        Returns:
            the communicator, which owns the sockets from then on.
        """
        if self.rank == 0:
            arena = _C.shm_arena_create(self.size, nonce)
            for link in self.sockets.values():
                socket.send_fds(link, [b"a"], [arena])
        else:
            self.sockets[0].settimeout(timeout)
            _, descriptors, _, _ = socket.recv_fds(self.sockets[0], 1, 1)
            self.sockets[0].settimeout(None)
            if not descriptors:
                raise RuntimeError("rank 0 sent no shared memory")
            arena = descriptors[0]
        try:
            pidfds, links = [-1] * self.size, [-1] * self.size
            for peer, link in self.sockets.items():
                pidfds[peer] = _open_pidfd(_peer(link)[0])
                links[peer] = link.detach()
            return _C.ShmCommunicator(arena, nonce, self.rank, self.size, cores, timeout, pidfds, links)
        finally:
            os.close(arena)

    def close(self) -> None:
        """Give back what no communicator took over."""
        for link in (self.listener, *self.sockets.values()):
            if link is not None:
                link.close()
        self.listener, self.sockets = None, {}

    @staticmethod
    def _check_user(link: socket.socket, peer: int) -> None:
        uid = _peer(link)[1]
        if uid != os.geteuid():
            raise RuntimeError(f"rank {peer} runs as user {uid}, this rank as {os.geteuid()}")


def _address(token: bytes) -> bytes:
    # The leading zero puts the name into the abstract name space: no file, gone with the socket.
    return b"\0tpweave-" + token.hex().encode()


def _peer(link: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; process 0 when it is in a PID namespace that this one cannot see."""
    pid, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def _open_pidfd(pid: int) -> int:
    """-1 where the system has none or does not show the process: its socket still tells when it ends."""
    if pid <= 0 or not hasattr(os, "pidfd_open"):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def join(group: TPGroup) -> tuple[Topology, str | None]:
    """Try to share memory among all ranks of `group`, else among those of each host: a collective.

    Returns:
        (the group's hosts with this host's communicator, None), or with the reason, in words, why it is not one host:
        the same kind on all ranks.

    Raises:
        RuntimeError: TPWEAVE_TRANSPORT=shm asks for what is not possible.
    """
    everyone = tuple(range(group.size))
    flat = Topology.flat(group.size, group.rank)
    forced = env.forced_transport()
    settings = group.all_gather_object(forced)
    if "pg" in settings:
        return flat, f"rank {settings.index('pg')}: TPWEAVE_TRANSPORT is pg"
    communicator, reached, reason = _share(group, everyone)
    if reason is None:
        return Topology((everyone,), group.rank, communicator), None
    if forced == "shm":
        raise RuntimeError(f"TPWEAVE_TRANSPORT is shm, but the ranks cannot share memory: {reason}")
    hosts = None if reached is None else hosts_of(reached)
    if hosts is None or not 1 < len(hosts) < group.size:
        return flat, reason
    communicator, _, failure = _share(group, next(ranks for ranks in hosts if group.rank in ranks))
    return (flat if failure is not None else Topology(hosts, group.rank, communicator)), reason


def _share(group: TPGroup, members: tuple[int, ...]) -> tuple[Any, list[frozenset[int]] | None, str | None]:
    """Share memory among `members`, this rank among them; the rest of the group does so at the same time.

    Returns:
        (communicator or None, the lower members that each rank of the group reached or None, why not in words): the
        last two the same on all ranks. A lone member has no communicator and needs none.
    """
    rendezvous = Rendezvous(members.index(group.rank), len(members))
    communicator, reached = None, None

    def agree(failure: str | None) -> str | None:
        failures = group.all_gather_object(failure)
        return next((f"rank {rank}: {reason}" for rank, reason in enumerate(failures) if reason is not None), None)

    def attempt(step: Any, *args: Any) -> tuple[Any, str | None]:
        try:
            return (None if len(members) == 1 else step(*args)), None
        except (OSError, RuntimeError) as error:
            return None, str(error)

    try:
        failure = attempt(rendezvous.listen)[1]
        cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
        everyone = group.all_gather_object(Member(rendezvous.token, cores, failure))
        reason = next((f"rank {rank}: {m.reason}" for rank, m in enumerate(everyone) if m.reason is not None), None)
        tokens = [everyone[rank].token for rank in members]
        if reason is None:
            failure = attempt(rendezvous.connect, tokens)[1]
            reached = group.all_gather_object(frozenset(members[peer] for peer in rendezvous.reached))
            reason = agree(failure)
        if reason is None:
            # Everybody has connected, so nobody waits in accept.
            reason = agree(attempt(rendezvous.accept, tokens, group.timeout)[1])
        if reason is None:
            processors = len(frozenset().union(*(everyone[rank].cores for rank in members)))
            communicator, failure = attempt(rendezvous.share, tokens[0], processors, group.timeout)
            reason = agree(failure)
    finally:
        rendezvous.close()
    return (communicator if reason is None else None), reached, reason


@dataclass(frozen=True)
class SymmetricBuffer:
    """One channel's memory: the same number of bytes for each rank, all mapped into every rank's process.

    Attributes:
        nbytes: data bytes of each rank, at least what was asked for.
        data_ptrs: address in this process of each rank's data, in rank order.
        signal_ptrs: address in this process of each rank's signal words (`SIGNAL_BYTES`, zero at first).
    """

    nbytes: int
    data_ptrs: tuple[int, ...]
    signal_ptrs: tuple[int, ...]


SIGNAL_BYTES: int = _C.SHM_SIGNAL_BYTES


def symmetric_buffer(group: TPGroup, channel: str, nbytes: int) -> SymmetricBuffer:
    """The memory of `channel`, made or enlarged when needed: then a collective, which all ranks of the group call.

    It belongs to one operation at a time; signals keep their values between calls, so count on from them. A larger
    request replaces the memory, with fresh zeros. It lives until the group is destroyed.

    Args:
        group: a group on the "shm" transport.
        channel: a name; operations that may overlap use different ones.
        nbytes: data bytes needed for each rank, equal on all.

    Raises:
        ValueError: the group has no shared memory.
        CollectiveMismatchError: the ranks asked for different channels or sizes.

    Example:
        >>> buffer = symmetric_buffer(group, "all_reduce", x.nbytes)
    """
    if group.shm is None:
        raise ValueError(f"symmetric_buffer needs the shm transport, {group!r}: {group.transport_reason}")
    known = group.symmetric_buffers.get(channel)
    if known is not None and known.nbytes >= nbytes:
        return known
    # At least twice what it replaces, which stays mapped: all of a channel's memory is at most twice its last.
    size = nbytes if known is None else max(nbytes, 2 * known.nbytes)
    data_ptrs, signal_ptrs = group.shm.symmetric_buffer(size, zlib.crc32(channel.encode()))
    group.symmetric_buffers[channel] = SymmetricBuffer(size, tuple(data_ptrs), tuple(signal_ptrs))
    return group.symmetric_buffers[channel]
