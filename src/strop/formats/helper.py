"""A process that does a stranger's work (renders a template, compiles a grammar) where it can be limited and killed."""

import os
import selectors
import subprocess
import sys
import time
import weakref

from strop.core.config import MIB
from strop.core.errors import CapacityError

_START_TIMEOUT_S = 60.0
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "PYTHONHOME")


class Helper:
    """One helper process and its two pipes, both non-blocking. Its side of them is `strop.formats.helper_worker`."""

    def __init__(self, module: str, memory_bytes: int, cpu_s: int) -> None:
        """Starts `python -m module` without waiting for it; its limits are in total memory, and seconds per request."""
        environ = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-P", "-m", module, str(memory_bytes), str(cpu_s)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the program, not for its helper
        )
        self.stop = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._module = module
        self._ready = False

    @property
    def ended(self) -> bool:
        """Whether it can serve no more."""
        return not self.stop.alive or self._process.poll() is not None

    def wait_ready(self) -> None:
        """Returns when it can serve. CapacityError if it cannot start."""
        if self._ready:
            return
        try:
            self.exchange(b"", max_reply_bytes=1024, timeout_s=_START_TIMEOUT_S)
        except (OSError, EOFError):  # TimeoutError is an OSError
            status = self._process.poll()
            self.stop()
            raise CapacityError(
                f"the helper process {self._module} did not start (exit status {status}); {sys.executable} must be "
                "able to run it within its memory limit"
            ) from None
        self._ready = True

    def exchange(self, request: bytes, *, max_reply_bytes: int, timeout_s: float) -> bytes:
        """Send one frame (none if empty) and receive one. Raises TimeoutError, or EOFError / OSError if it ended."""
        deadline_s = time.monotonic() + timeout_s
        unsent = memoryview(request)
        reply = bytearray()
        reply_len = 4
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(self._stdin, selectors.EVENT_WRITE)
            while len(reply) < reply_len:
                remaining_s = deadline_s - time.monotonic()
                ready = selector.select(max(remaining_s, 0))
                if not ready and remaining_s <= 0:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._stdin:
                        unsent = unsent[os.write(self._stdin, unsent[: 64 * 1024]) :]
                        if not unsent:
                            selector.unregister(self._stdin)
                        continue
                    data = os.read(self._stdout, min(reply_len - len(reply), MIB))
                    if not data:
                        raise EOFError
                    reply += data
                    if reply_len == 4 and len(reply) == 4:
                        reply_len += int.from_bytes(reply, "little")
                        if reply_len > max_reply_bytes + 4:
                            raise EOFError
        return bytes(reply[4:])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
