"""Several processes that run one engine on one mesh, as jax.distributed has it: the first leads, the others follow.

The first has the scheduler and all requests. It says to the others what it calls the model with, so that all make the
same steps, in the same order, each on its own devices (strop.engine.lead). Until that begins:

    follower                        first process
    Hello            ->             waits until all have come
                     <-             Welcome: the config to run, and the address of jax's coordinator
    jax.distributed.initialize, the model is loaded
    Ready            ->             the cache gets as many blocks as there is room for everywhere

A process that does not come in time, or is lost later, ends the engine on all of them with an error.
"""

import atexit
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from strop import __version__
from strop.core.config import EngineConfig, Processes
from strop.core.errors import CapacityError, EngineDownError, RequestError
from strop.engine.channel import Call, Channel, End, Hello, Ready, Refused, Welcome
from strop.models.mesh import MeshShape

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_FAREWELL_S = 5.0
_ENDING_S = 1.0
"""Until the connections of a process that ends are closed, one by one."""
_MAX_HELLO_BYTES = 1 << 16
_QUIET_S = 2.0
"""Who waits for longer says for whom."""


class Followers:
    """The other processes, as the first one sees them."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        """By process_id."""
        self.has_left = False
        """Whether all processes have left jax together."""
        self._channels = dict(channels)
        self._num_processes = len(channels) + 1
        self._lost: str | None = None
        self._lock = threading.Lock()  # whoever ends the engine may be another thread

    @property
    def descriptors(self) -> list[int]:
        """Of files that become readable when a process is lost."""
        return [channel.fileno() for channel in self._channels.values()]

    def agree(self, own: Ready) -> int:
        """Waits until all have loaded. Returns the blocks that the cache is to have.

        Raises:
            EngineDownError: one of them could not.
            RequestError: one has another model, or runs it otherwise.
        """
        num_blocks = own.num_blocks
        for process_id, channel in self._channels.items():
            try:
                ready = channel.receive()
            except OSError as error:
                raise self._lose(process_id, error) from None
            assert isinstance(ready, Ready)
            if ready.model_hash != own.model_hash:
                raise RequestError(
                    f"process {process_id} has another model: its files' hash is {ready.model_hash:.12}, and"
                    f" {own.model_hash:.12} here: give all processes the same files"
                )
            if ready.platform != own.platform:
                raise RequestError(
                    f"process {process_id} runs on {ready.platform!r}, and the first on {own.platform!r}: the native"
                    " kernels must be usable on all hosts or, with STROP_NATIVE=0, on none"
                )
            num_blocks = min(num_blocks, ready.num_blocks)
        return num_blocks

    def tell(self, call: Call | Welcome) -> None:
        """Says to all what to do next. EngineDownError if one of them is no longer there."""
        with self._lock:
            self.check()
            for process_id, channel in self._channels.items():
                try:
                    channel.send(call)
                except OSError as error:
                    raise self._lose(process_id, error) from None

    def check(self, wait_s: float = 0.0) -> None:
        """EngineDownError if one of them is no longer there, or ends while it is waited for that."""
        if self._lost is not None:
            raise EngineDownError(self._lost)
        poll = select.poll()
        for descriptor in self.descriptors:
            poll.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poll.poll(1000 * wait_s)]  # they say nothing unasked
        for process_id, channel in self._channels.items():
            if channel.fileno() in ended:
                raise self._lose(process_id)

    def step_failed(self, error: Exception) -> EngineDownError:
        """What to raise when a step could not be made here: the others cannot know how far it got."""
        with suppress(EngineDownError):
            self.check(_ENDING_S)
        if self._lost is None:
            self._abandon(f"a step of {self._num_processes} processes failed: {error}; start the others again")
        return EngineDownError(str(self._lost))

    def close(self) -> None:
        """Ends the other processes, if none is lost."""
        with self._lock:
            if self._lost is not None:
                return
            for process_id, channel in self._channels.items():
                try:
                    channel.send(End())
                    while True:
                        channel.receive(_FAREWELL_S)
                except OSError as error:  # it has ended, too
                    log.debug("process %d: %s", process_id, error)
            self._abandon("the engine was closed")
        _leave_jax()
        self.has_left = True

    def _lose(self, process_id: int, error: Exception | None = None) -> EngineDownError:
        reason = f" ({error})" if error else ""
        self._abandon(
            f"process {process_id} of {self._num_processes} was lost{reason}: see what it printed, and start it again"
        )
        return EngineDownError(str(self._lost))

    def _abandon(self, why: str) -> None:
        self._lost = why
        for channel in self._channels.values():
            channel.close()


class Leader:
    """The first process, as the others see it."""

    def __init__(self, channel: Channel) -> None:
        self.has_left = False
        """Whether all processes have left jax together."""
        self._channel = channel

    def agree(self, own: Ready) -> int:
        """Says that the model is loaded here. Returns the blocks there is room for; the first process says how many."""
        try:
            self._channel.send(own)
        except OSError as error:
            raise _leader_lost(error) from None
        return own.num_blocks

    def calls(self) -> Iterator[Call]:
        """What to do, until the first process ends. EngineDownError if it is lost."""
        while True:
            try:
                call = self._channel.receive()
            except OSError as error:
                raise _leader_lost(error) from None
            if isinstance(call, End):
                self._channel.close()
                _leave_jax()
                self.has_left = True
                return
            assert isinstance(call, Call)
            yield call

    def close(self) -> None:
        """The first process sees that this one is gone."""
        self._channel.close()


def join(config: EngineConfig, processes: Processes) -> tuple[Followers | Leader, EngineConfig]:
    """Waits for the other processes and starts jax on all. Returns them, and what is to run here.

    That is what the first process was told to run; only the limits of memory and threads are each process's own.

    Raises:
        RequestError: the settings are impossible, or the first process refuses them.
        CapacityError: the address cannot be listened on.
        EngineDownError: the others did not come in time.
    """
    address = _check(config, processes)
    if processes.process_id == 0:
        come = _gather(processes, address)
        jax_address = f"{processes.coordinator.rpartition(':')[0]}:{_free_port(address[0])}"
        followers = Followers(come)
        followers.tell(Welcome(config, jax_address))
        group: Followers | Leader = followers
    else:
        channel, welcome = _find(processes, address)
        group, jax_address, own = Leader(channel), welcome.jax_address, config
        config = replace(
            welcome.config, processes=processes, memory_bytes=own.memory_bytes, num_threads=own.num_threads
        )
    import jax  # noqa: F401  # registers an exit function of its own, which must come after this one

    atexit.register(_at_exit, group)
    _start_jax(processes, jax_address)
    return group, config


def _check(config: EngineConfig, processes: Processes) -> tuple[str, int]:
    """The address of the first process."""
    num, own = processes.num_processes, processes.process_id
    if num < 2:
        raise RequestError(f"num_processes={num} is out of range: 2 or more; for one process leave out the coordinator")
    if not 0 <= own < num:
        raise RequestError(f"process_id={own} is out of range: 0 to {num - 1}, as num_processes={num}")
    if own == 0 and not config.mesh:
        raise RequestError(f"num_processes={num} needs a mesh of all their devices: give one, such as mesh='{num}'")
    if own == 0 and (size := MeshShape.parse(config.mesh).size()) % num:
        raise RequestError(
            f"mesh={config.mesh!r} has {size} devices, which num_processes={num} cannot share evenly: choose a multiple"
        )
    host, _, port = processes.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise RequestError(
            f"coordinator={processes.coordinator!r:.80} is no address: give HOST:PORT, such as 10.0.0.1:8476"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _gather(processes: Processes, address: tuple[str, int]) -> dict[int, Channel]:
    """All other processes, by process_id."""
    try:
        listener = socket.create_server(address, family=_family(address))
    except OSError as error:
        raise CapacityError(
            f"coordinator={processes.coordinator!r} cannot be listened on ({error}): give an address of the machine of"
            " process_id=0, and a port that is free"
        ) from None
    come: dict[int, Channel] = {}
    patience = _Patience(processes.join_timeout_s)
    with listener:
        listener.settimeout(0.2)
        while missing := sorted(set(range(1, processes.num_processes)) - come.keys()):
            who = f"process {', '.join(map(str, missing))} of {processes.num_processes}"
            if patience.is_over(f"{who} at {processes.coordinator}"):
                for channel in come.values():
                    channel.close()
                raise EngineDownError(
                    f"{who} did not come to {processes.coordinator} within {processes.join_timeout_s:.0f} s: start it"
                    f" with coordinator={processes.coordinator} num_processes={processes.num_processes}"
                    f" process_id={missing[0]}"
                )
            with suppress(TimeoutError):
                _let_in(listener.accept()[0], come, processes.num_processes)
    return come


def _let_in(connection: socket.socket, come: dict[int, Channel], num_processes: int) -> None:
    """Adds a process to those that have come; anything else on the network is sent away."""
    channel = Channel(connection, _MAX_HELLO_BYTES)
    try:
        hello = channel.receive(_HELLO_TIMEOUT_S)
        if not isinstance(hello, Hello):
            raise ConnectionError("it did not say hello")
        if hello.version != __version__:
            theirs, reason = hello.version, f"the first process is Strop {__version__}"
            channel.send(Refused(f"this is Strop {theirs}, and {reason}: install the same on all machines"))
        elif hello.num_processes != num_processes or not 0 < hello.process_id < num_processes:
            channel.send(Refused(f"the first process has num_processes={num_processes}: start all with the same"))
        else:
            if before := come.pop(hello.process_id, None):  # it was started again
                before.close()
            come[hello.process_id] = channel
            return
    except OSError as error:
        log.warning("a connection was dropped: %s", error)
    channel.close()


def _find(processes: Processes, address: tuple[str, int]) -> tuple[Channel, Welcome]:
    patience = _Patience(processes.join_timeout_s)
    while not patience.is_over(f"process 0 at {processes.coordinator}"):
        try:
            channel = Channel(socket.create_connection(address, timeout=patience.left_s))
        except OSError:  # it is not there yet
            time.sleep(0.1)
            continue
        try:
            channel.send(Hello(__version__, processes.num_processes, processes.process_id))
            answer = channel.receive(patience.left_s)
            if isinstance(answer, Welcome):
                return channel, answer
        except OSError as error:  # it starts again
            log.debug("%s: %s", processes.coordinator, error)
            time.sleep(0.1)
            answer = None
        channel.close()
        if isinstance(answer, Refused):
            raise RequestError(f"process_id={processes.process_id} was refused: {answer.reason}")
    raise EngineDownError(
        f"not all {processes.num_processes} processes came to {processes.coordinator} within"
        f" {processes.join_timeout_s:.0f} s: start them all, that with process_id=0 on the machine of that address"
    )


class _Patience:
    """How long to wait for others, and a word to the user who waits for them."""

    def __init__(self, timeout_s: float) -> None:
        self._began_s, self._timeout_s, self._has_spoken = time.monotonic(), timeout_s, False

    @property
    def left_s(self) -> float:
        """Until it is over; never quite 0, which sockets take for something else."""
        return max(self._began_s + self._timeout_s - time.monotonic(), 0.01)

    def is_over(self, whom: str) -> bool:
        """Whether that has been waited for long enough."""
        waited_s = time.monotonic() - self._began_s
        if waited_s > _QUIET_S and not self._has_spoken:
            self._has_spoken = True
            log.warning("waiting for %s, for up to %.0f s", whom, self._timeout_s)
        return waited_s > self._timeout_s


def _start_jax(processes: Processes, address: str) -> None:
    import jax

    if jax.distributed.is_initialized():
        raise RequestError("this process has run an engine of several processes: start a new one for another")
    update: Callable[[str, object], None] = jax.config.update
    update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):  # with which SIGTERM would end nothing
        update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            processes.num_processes,
            processes.process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address,
            initialization_timeout=60,
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=10,
        )
        jax.devices()  # which the processes tell each other
    except RuntimeError as error:
        raise EngineDownError(
            f"jax.distributed did not start in process {processes.process_id} at {address} ({error}): make the engine"
            " before anything else uses jax, and start all processes again"
        ) from error


def _leave_jax() -> None:
    import jax

    jax.distributed.shutdown()


def _at_exit(group: Followers | Leader) -> None:
    group.close()
    if not group.has_left:  # jax would wait for the others in vain, and then abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family((host, 0))) as found:
        return int(found.getsockname()[1])


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]


def _leader_lost(error: Exception) -> EngineDownError:
    return EngineDownError(f"process 0 was lost ({error}): see what it printed, and start this one again")
