# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One QMP connection, with a deadline on everything.

qemu.qmp has no time-outs of its own, and a monitor that another client holds accepts a
connection and then stays silent. Private to the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import typing as t

from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

if t.TYPE_CHECKING:
    from qemu.qmp import EventListener, QMPClient

Event = t.Mapping[str, t.Any]

# Seconds that a QEMU gets to greet a new client; a healthy one needs milliseconds.
CONNECT_TIMEOUT = 5.0
# Seconds that a QEMU gets for one command; all that are used here answer at once.
COMMAND_TIMEOUT = 10.0
# Connections in a row that may bring what the client before us was still owed: an event, a reply.
_STALE = 3


@functools.lru_cache(maxsize=None)
def _client_class() -> type[QMPClient]:
    """qemu.qmp's client, without its habit of formatting every message for a debug log.

    That costs more than all else together, most of it between STOP and RESUME. Made on first
    use: the module must load where the library isn't there yet.
    """
    from qemu.qmp import QMPClient

    class Client(QMPClient):
        """A client that does not log messages."""

        def _cb_outbound(self, msg: t.Any) -> t.Any:
            return msg

        def _cb_inbound(self, msg: t.Any) -> t.Any:
            return msg

    return Client


class Monitor:
    """An open QMP connection. Use `connect` or `adopt` to get one."""

    def __init__(self, client: QMPClient, where: str) -> None:
        self._client = client
        self.where = where

    @classmethod
    async def connect(cls, path: str, timeout: float = CONNECT_TIMEOUT, *, pid: int) -> Monitor:
        """Connect to a QMP monitor at a UNIX socket.

        A QEMU whose client left during a command may send its event and its reply to the next client,
        before the greeting or right after it (seen with QEMU 11.1). We leave that connection for another.

        :param path: where the socket lies.
        :param timeout: seconds until it must have greeted us.
        :param pid: the process that must listen there. During an update two QEMUs' monitors have
            paths that change hands.
        :raises CprError: ``monitor-busy`` if it accepts us and stays silent;
            ``monitor-unreachable`` if nobody listens there or it isn't QMP;
            ``monitor-of-another`` if another process listens there.
        """
        for dummy in range(_STALE):
            try:
                return await cls._connect(path, timeout, pid)
            except CprError as error:
                if not _is_misunderstood(error.__cause__):
                    raise
        return await cls._connect(path, timeout, pid)

    @classmethod
    async def _connect(cls, path: str, timeout: float, pid: int) -> Monitor:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            try:
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, path), timeout)
            except BlockingIOError:  # others wait for it already
                raise _busy(path, timeout) from None
            except OSError as error:
                raise _unreachable(path, error) from error
            # Of the process that listens (unix(7)).
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            listener: int = struct.unpack("3i", credentials)[0]
            if listener != pid:
                raise CprError(
                    "monitor-of-another",
                    f"At the QMP monitor {path} another process listens ({listener}) than the QEMU that was looked for"
                    f" ({pid}).",
                    "See with `ss -xlp` whose socket that is, and give the guest a monitor of its own.",
                )
            return await cls._open(connection, path, timeout)
        except BaseException:
            connection.close()
            raise

    @classmethod
    async def adopt(cls, connection: socket.socket, where: str, timeout: float = CONNECT_TIMEOUT) -> Monitor:
        """Use a socket that is connected to a QEMU already.

        :param where: how to call it in a message.
        :raises CprError: as `connect`.
        """
        return await cls._open(connection, where, timeout)

    @classmethod
    async def _open(cls, address: str | socket.socket, where: str, timeout: float) -> Monitor:
        from qemu.qmp import QMPError

        client = _client_class()()
        try:
            await asyncio.wait_for(client.connect(address), timeout)
        except asyncio.TimeoutError:
            raise _busy(where, timeout) from None
        except (QMPError, OSError, EOFError) as error:
            raise _unreachable(where, error) from error
        return cls(client, where)

    async def execute(
        self, command: str, arguments: t.Mapping[str, t.Any] | None = None, timeout: float = COMMAND_TIMEOUT
    ) -> t.Any:
        """Execute one QMP command and return what it returns.

        :param timeout: seconds until QEMU must have answered.
        :raises CprError: ``qmp-error`` with QEMU's own words if it refuses;
            ``qmp-timeout`` if it doesn't answer; ``monitor-lost`` if the connection ends.
        """
        from qemu.qmp import ExecuteError, QMPError

        try:
            return await asyncio.wait_for(self._client.execute(command, arguments), timeout)
        except asyncio.TimeoutError:
            raise CprError(
                "qmp-timeout",
                f"QEMU did not answer {command} at {self.where} within {timeout:g} s.",
                "The process hangs or is stopped; see its state in /proc/PID/status.",
            ) from None
        except ExecuteError as error:
            raise CprError(
                "qmp-error",
                f"QEMU refused {command}: {error}.",
                qemu_class=error.error_class,
                qemu_description=str(error),
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise CprError(
                "monitor-lost",
                f"The connection to the QMP monitor at {self.where} ended during {command}.",
                "QEMU exited, or somebody cut the connection.",
            ) from error

    async def human(self, line: str) -> str:
        """What a command of the human monitor prints, for what QMP doesn't have.

        :raises CprError: as `execute`.
        """
        return await self.execute("human-monitor-command", {"command-line": line})

    @contextlib.contextmanager
    def events(self, *names: str) -> t.Iterator[EventListener]:
        """Collect the events of these names from now on."""
        with self._client.listener(names) as listener:
            yield listener

    async def next_event(self, listener: EventListener) -> Event:
        """The next event of a listener.

        Sets no deadline of its own; wrap it in one.

        :raises CprError: ``monitor-lost`` if the connection ends before one comes.
        """
        from qemu.qmp import Runstate

        if not listener.empty():
            return await listener.get()
        waiting = asyncio.ensure_future(listener.get())
        # A listener alone would wait for ever behind a connection that has ended.
        ending = asyncio.ensure_future(self._client.runstate_changed())
        try:
            if self._client.runstate == Runstate.RUNNING:
                await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
        finally:
            waiting.cancel()
            ending.cancel()
        raise CprError(
            "monitor-lost",
            f"The connection to the QMP monitor at {self.where} ended.",
            "QEMU exited, or somebody cut the connection.",
        )

    async def close(self) -> None:
        """Close the connection; a QEMU that is gone already is no error."""
        from qemu.qmp import QMPError

        with contextlib.suppress(QMPError, OSError, EOFError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.disconnect(), CONNECT_TIMEOUT)

    async def __aenter__(self) -> Monitor:
        return self

    async def __aexit__(self, *dummy: object) -> None:
        await self.close()


def _is_misunderstood(error: BaseException | None) -> bool:
    """Whether something answered that was no greeting, or no answer to the client's first command."""
    from qemu.qmp import ConnectError
    from qemu.qmp.qmp_client import GreetingError, NegotiationError

    return isinstance(error, ConnectError) and isinstance(error.exc, (GreetingError, NegotiationError))


def _busy(where: str, timeout: float) -> CprError:
    return CprError(
        "monitor-busy",
        f"The QMP monitor at {where} accepted the connection but did not answer within {timeout:g} s:"
        " another client holds it.",
        f"Find it with `ss -xp | grep {where}` and stop it, or give the guest a second -qmp socket.",
    )


def _unreachable(where: str, error: BaseException) -> CprError:
    return CprError(
        "monitor-unreachable",
        f"Nothing answers at the QMP monitor {where}: {error}.",
        "Check that the socket is still there and that the task runs as a user that may open it (become).",
    )
