"""The meeting of ranks, in the open: what is waited for is said, and Ctrl-C and SIGTERM are obeyed meanwhile.

PyTorch's own rendezvous waits in C++, silently and deaf to signals. Here the store of rank 0 is asked in short calls,
and what can only block (the sockets between all ranks) runs in a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from data2vec.core.distributed.launchers import Place
from data2vec.core.errors import ConfigError, PeerError, RankLostError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 1.5
_ANSWER = timedelta(seconds=10)  # of a store that is there
_FIRST_SAID = 2.0  # s; then after twice as long each time
_UNRESOLVED_SECONDS = 30.0  # a name may be published only when its host is up
_FOREIGN_SECONDS = 20.0  # that something listens and does not answer as a store
_PREFIX = "data2vec/meeting/"


class _StuckError(Exception):
    """A call that has not come back in time; its thread ends with the process."""


def _interruptible(function: Callable[[], T], seconds: float) -> T:
    """Call what blocks outside of Python, where no signal is seen, in a thread.

    Raises:
        _StuckError: it does not come back in time.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < until:
        thread.join(_POLL_SECONDS)
    if failures:
        raise failures[0]
    if not results:
        raise _StuckError
    return results[0]


class Meeting:
    """The place where the ranks of a run wait for each other, and how long.

    Args:
        here: this rank.
        host: rank 0's.
        port: of its store.
        minutes: after which it fails (``engine.join_minutes``).
    """

    def __init__(self, here: Place, host: str, port: int, minutes: float) -> None:
        self.here, self.host, self.port, self.minutes = here, host, port, minutes
        self.address = f"{host}:{port}"
        self._began = time.monotonic()
        self._say_at = _FIRST_SAID

    def store(self) -> Store:
        """The store in which every rank has been seen.

        Raises:
            ConfigError: a rank does not come, or is not what the others expect; one of them says which.
            PeerError: another rank says it.
            RankLostError: rank 0 has ended.
        """
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a store at this address
        store: Store = self._hosted() if self.here.rank == 0 and not agent else self._reached()
        if agent:  # each restart of the ranks begins anew in the same store
            store = PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        ours = PrefixStore(_PREFIX, store)
        try:
            self._gather(ours)
        except (KeyboardInterrupt, ConfigError) as error:
            with contextlib.suppress(RuntimeError):
                ours.set("failed", str(error) or f"rank {self.here.rank} was interrupted")
            if self.here.rank == 0 and isinstance(error, ConfigError):
                time.sleep(10 * _POLL_SECONDS)  # the others are to read it before the store is gone
            raise
        return store

    def connect(self, function: Callable[[], None]) -> None:
        """Call what connects all ranks, and can only block, for as long as is left.

        Raises:
            ConfigError: it does not come to an end.
        """
        try:
            _interruptible(function, 60 * self.minutes - self._waited())
        except _StuckError:
            raise self._failed(
                "cannot connect to the others, which have come: one has ended, or the network that is taken is wrong "
                "(set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            ) from None

    def _hosted(self) -> Store:
        try:
            with socket.socket() as probe:  # torch says the same in many lines
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", self.port))
            return TCPStore(
                "127.0.0.1", self.port, self.here.world, is_master=True, timeout=_ANSWER, wait_for_workers=False
            )
        except (OSError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise self._failed(
                f"cannot listen there ({first}): another run or program uses the port (choose another MASTER_PORT), "
                "or two processes are rank 0"
            ) from None

    def _reached(self) -> Store:
        while True:
            try:
                with socket.create_connection((self.host, self.port), timeout=_CONNECT_SECONDS):
                    pass
                return self._connected()
            except socket.gaierror as error:
                reason = f"the host's name is not known here ({error.strerror})"
                if self._waited() > _UNRESOLVED_SECONDS:
                    raise self._failed(f"finds no such host ({error.strerror}): correct MASTER_ADDR") from None
            except OSError as error:
                reason = f"nothing listens there yet ({error.strerror or error})"
            except RuntimeError as error:  # it has just ended, say
                reason = f"what listens there does not answer ({str(error).splitlines()[0][:100]})"
            self._wait(
                f"rank {self.here.rank} of {self.here.world} is waiting for rank 0 at {self.address}: {reason}",
                "does not reach rank 0",
                speaks=self.here.local_rank == 0,
            )

    def _connected(self) -> Store:
        def connect() -> Store:
            return TCPStore(self.host, self.port, self.here.world, False, timeout=_ANSWER, wait_for_workers=False)

        try:
            return _interruptible(connect, _FOREIGN_SECONDS)  # it waits for an answer for ever
        except _StuckError:
            raise self._failed(
                "finds another program there, which does not answer: choose another MASTER_PORT"
            ) from None

    def _gather(self, store: Store) -> None:
        here = self.here
        try:
            if store.add(f"rank/{here.rank}", 1) > 1:
                raise self._failed(
                    f"is there twice: two processes have RANK={here.rank}, or another run uses this address (choose "
                    "another MASTER_PORT)"
                )
            world = int(store.compare_set("world", "", str(here.world)))
            if world != here.world:
                raise self._failed(f"belongs to {here.world} ranks and another to {world}: give all one WORLD_SIZE")
            store.add("come", 1)
            while store.add("come", 0) < here.world:
                if store.check(["failed"]):
                    raise PeerError(store.get("failed").decode(errors="replace"))
                self._wait_for_others(store)
        except RuntimeError as error:
            raise RankLostError(
                f"rank 0 at {self.address} has ended while the ranks waited for each other "
                f"({str(error).splitlines()[0][:200]}); its own message or the launcher's says why"
            ) from None

    def _wait_for_others(self, store: Store) -> None:
        missing = ""
        late = self._waited() > 60 * self.minutes
        if late or self._waited() > self._say_at:
            absent = [str(rank) for rank in range(self.here.world) if not store.check([f"rank/{rank}"])]
            missing = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        count = self.here.world - int(store.add("come", 0))
        self._wait(
            f"waiting for {count} of {self.here.world} ranks at {self.address} (rank {missing})",
            f"has waited for rank {missing}, which has not come", speaks=self.here.rank == 0,
        )  # fmt: skip

    def _wait(self, what: str, failure: str, *, speaks: bool) -> None:
        if self._waited() > 60 * self.minutes:
            raise self._failed(
                f"{failure} in {self.minutes:g} minutes (engine.join_minutes): see whether every rank was started and "
                "what it says, and whether hosts, port (MASTER_ADDR, MASTER_PORT) and firewalls are right. For one "
                "process set RANK=0 WORLD_SIZE=1"
            )
        if self._waited() > self._say_at:
            self._say_at *= 2
            if speaks:
                _log.info("%s; giving up after %g minutes", what, self.minutes)
        time.sleep(_POLL_SECONDS)

    def _waited(self) -> float:
        return time.monotonic() - self._began

    def _failed(self, what: str) -> ConfigError:
        here = f"rank {self.here.rank} of {self.here.world}"
        return ConfigError([f"environment: {here}, which meets the others at {self.address}, {what}"])
