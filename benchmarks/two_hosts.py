"""Two hosts on one machine: network namespaces joined by a veth pair of a given rate, and torchrun across them.

Ranks in different namespaces reach each other over the pair only, and cannot share memory: to tpweave they are on
different hosts. Needs root, `ip` and `tc`; `objection` says what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# 192.0.2.0/24 is for examples (RFC 5737): no machine routes it.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACE = "link0"
_numbers = itertools.count()


class NamespaceError(RuntimeError):
    """Namespaces cannot be made here; the message is what the system said."""


@dataclass(frozen=True)
class TwoHosts:
    """The two namespaces, by name. Inside each, INTERFACE leads to the other and has the address of the same index."""

    namespaces: tuple[str, str]

    def paths(self) -> tuple[str, ...]:
        """The files of the namespaces, for `setns`."""
        return tuple(f"/run/netns/{name}" for name in self.namespaces)

    def sent_bytes(self) -> list[int]:
        """Bytes that each host has put on the link since it was made, headers included."""
        return [int(_run("ip", "netns", "exec", name, "cat", _COUNTER)) for name in self.namespaces]

    def command(self, host: int, arguments: Sequence[str]) -> list[str]:
        """The command that runs `arguments` on a host."""
        return ["ip", "netns", "exec", self.namespaces[host], *arguments]

    def torchrun(
        self, arguments: Sequence[str], *, ranks_per_host: int = 2, port: int = 29400, timeout: float = 120.0
    ) -> str:
        """Run a module or script on both hosts by torchrun, e.g. `["-m", "package.module"]`.

        Returns:
            what rank 0's host printed.

        Raises:
            RuntimeError: a rank failed or was too late; the message ends with the output of both hosts.
        """
        running = []
        try:
            for host in range(2):
                launcher = [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host}",
                    f"--nproc-per-node={ranks_per_host}", f"--master-addr={ADDRESSES[0]}", f"--master-port={port}",
                ]  # fmt: skip
                environment = {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}
                command = self.command(host, [*launcher, *arguments])
                running.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                    )
                )
            printed = [process.communicate(timeout=timeout)[0] for process in running]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(arguments)} had not ended after {timeout:.0f} s") from None
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if any(process.returncode != 0 for process in running):
            codes = [process.returncode for process in running]
            raise RuntimeError(f"{' '.join(arguments)} ended with {codes}:\n" + "\n".join(printed)[:9000])
        return printed[0]


_COUNTER = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise NamespaceError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextlib.contextmanager
def two_hosts(rate: str = "1gbit") -> Iterator[TwoHosts]:
    """Two hosts, joined in both directions at `rate` (as `tc` writes it). They are gone afterwards, whatever happens.

    Raises:
        NamespaceError: they cannot be made here.
    """
    number = next(_numbers)
    names = (f"tpweave-{os.getpid()}-{number}-a", f"tpweave-{os.getpid()}-{number}-b")
    made = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        # The peer is made in its namespace: the machine's own sees neither end.
        far_end = ("peer", "name", INTERFACE, "netns", names[1])
        _run("ip", "-n", names[0], "link", "add", INTERFACE, "type", "veth", *far_end)
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run(
                "tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", rate, "burst", "128kb",
                "latency", "20ms",
            )  # fmt: skip
        yield TwoHosts(names)
    finally:
        for name in made:
            # Processes that still run there would keep the namespace, and the link with it.
            for pid in _run("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            _run("ip", "netns", "delete", name)


def objection() -> str | None:
    """None where two hosts can be made, else why not."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"needs {tool} (iproute2), which is not installed"
    try:
        with two_hosts():
            return None
    except NamespaceError as error:
        return str(error)
