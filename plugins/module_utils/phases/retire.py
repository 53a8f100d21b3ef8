# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gets the old QEMU out of the way of the new one, which runs the guest.

Private to the collection.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    journal,
    network,
    permissions,
    process,
    systemd,
    user_network,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import CPR_EXEC
from ansible_collections.vmfleet.cpr.plugins.module_utils.monitor import Monitor
from ansible_collections.vmfleet.cpr.plugins.module_utils.phases import failures, reach, setup, verify
from ansible_collections.vmfleet.cpr.plugins.module_utils.process import Watch

# Seconds that the old QEMU gets to quit by itself before it is killed.
QUIT_TIMEOUT = 10.0


async def retire(update: journal.Update, monitor: Monitor, old_monitor: Monitor | None) -> None:
    """Once the guest is seen on the new QEMU, end the old one and hand its paths over.

    :param monitor: the new QEMU's.
    :param old_monitor: the old QEMU's, where it is open.
    :raises CprError: ``guest-not-running`` if the new QEMU doesn't run the guest: the old one
        is then left as it is, stopped; ``new-qemu-gone``; ``path-not-restored``; or as
        `verify.verify`.
    """
    old, new = failures.both(update)
    with Watch(old.identity) as old_watch, Watch(new.identity) as new_watch:
        try:
            await _retire(update, monitor, old_monitor, old_watch)
        except CprError as error:
            if error.code in ("monitor-lost", "path-not-restored") and await new_watch.wait(reach.LAST_BREATH):
                raise failures.new_qemu_gone(update) from error
            if error.code != "monitor-lost":
                raise
            # Somebody cut the connection; every step can be done twice.
            async with await reach.new_qemu(update, new_watch) as again:
                await _retire(update, again, None, old_watch)


async def _retire(update: journal.Update, monitor: Monitor, old_monitor: Monitor | None, old_watch: Watch) -> None:
    started = time.monotonic()
    old, new = failures.both(update)
    status = (await monitor.execute("query-status"))["status"]
    if status not in ("running", "paused"):  # somebody may have paused it since
        raise CprError(
            "guest-not-running",
            f"After the switch the guest's run state is {status}.",
            f"The old QEMU (process {old.pid}) was left stopped and must not be continued. Look at the guest.",
        )
    if update.mode == CPR_EXEC:
        await _finish_in_place(update, monitor, started)
        return
    problems = _copy_permissions(update)
    problems += await network.take_addresses(new.pid, update.taps)
    if update.unit:
        problems += await _hand_unit_over(update, update.unit, old_watch)
    if not old_watch.ended.is_set():
        # After the network and the unit: a heartbeat may need the one, and nothing that becomes of the
        # old QEMU from here on may end the other.
        await verify.verify(update, monitor)
    if not old_watch.ended.is_set():
        with contextlib.suppress(CprError):  # it may exit before it answers
            if old_monitor:
                await old_monitor.execute("quit")
            else:
                async with await reach.old_qemu(update, old_watch) as monitor_of_old:
                    await monitor_of_old.execute("quit")
        if not await old_watch.wait(QUIT_TIMEOUT):
            await old_watch.kill()
    _restore_paths(update)
    problems += await network.take_names(new.pid, update.taps)
    await restore_ports(update, monitor)
    with contextlib.suppress(OSError):
        os.unlink(update.log_of(update.generation - 1))
    await _finish(update, monitor, started, problems)


async def _finish_in_place(update: journal.Update, monitor: Monitor, started: float) -> None:
    """There is no old QEMU to end: only what the new one has bound anew is put right."""
    permissions.put_back(update.permissions)
    await restore_ports(update, monitor)
    await verify.verify(update, monitor)
    await _finish(update, monitor, started, [])


async def _finish(update: journal.Update, monitor: Monitor, started: float, problems: list[str]) -> None:
    await setup.put_back(monitor, update.restore)
    shutil.rmtree(update.channels, ignore_errors=True)
    update.remove_mark()
    with contextlib.suppress(OSError):
        os.unlink(update.progress)
    update.took("retire", started)
    message = " ".join([_message(update), *problems])
    try:
        update.enter(journal.FINISHED, message)
    except CprError as error:
        error.message = f"{message} Only that could not be recorded: {error.message}"
        raise


def _message(update: journal.Update) -> str:
    """What a finished update did, as a sentence."""
    old, new = failures.both(update)
    pause = f" after a pause of {update.pause_ms:g} ms" if update.pause_ms is not None else ""
    copied = ""
    if update.copied:
        copied = " Its {mib_total} MiB of RAM were copied in {passes} passes, within {seconds} s.".format(
            **update.copied
        )
    return f"The guest went from QEMU {old.version} to {new.version} by {update.mode}{pause}.{copied}"


def _copy_permissions(update: journal.Update) -> list[str]:
    """Give the new sockets and pid file the old ones' owner and mode, while those are there.

    Whoever started the guest may have let others in.

    :returns: what did not work, as sentences.
    """
    problems = []
    for temporary, stable in update.renames:
        try:
            status = os.stat(stable)
            os.chown(temporary, status.st_uid, status.st_gid)
            os.chmod(temporary, stat.S_IMODE(status.st_mode))
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{stable} could not be given its owner and mode: {error.strerror}.")
    return problems


def _restore_paths(update: journal.Update) -> None:
    """Rename the generation's sockets and pid file over the stable paths.

    Only now: the old QEMU removes the stable paths when it exits.
    """
    dummy, new = failures.both(update)
    for temporary, stable in update.renames:
        try:
            os.rename(temporary, stable)
        except FileNotFoundError:
            if not os.path.exists(stable):
                raise _path_not_restored(stable, "it is gone") from None
        except OSError as error:
            raise _path_not_restored(stable, error.strerror) from error
        if new.monitor == temporary:
            new.monitor = stable


async def _hand_unit_over(update: journal.Update, unit: str, old_watch: Watch) -> list[str]:
    """Before the old QEMU goes: systemd ends a service whose main process ends."""
    old, new = failures.both(update)
    try:
        await systemd.hand_over(unit, old.pid, new.pid)
    except CprError as error:
        if not old_watch.ended.is_set():
            raise
        # Somebody ended it first; nothing is left to be saved by waiting.
        return [f"The systemd unit {unit} does not follow it any more: {error.message}"]
    with contextlib.suppress(OSError):  # it is gone, which others will notice
        if process.parent(new.pid) != 1:
            return [f"systemd is not the parent of its process: {unit} won't be restarted if that fails."]
    return []


async def restore_ports(update: journal.Update, monitor: Monitor) -> None:
    """Let the new QEMU listen where the old one did; only now are those ports free.

    :raises CprError: ``port-not-restored``.
    """
    try:
        if update.display:
            await monitor.execute("display-update", update.display)
        if update.forwards:
            present = user_network.forwards(await monitor.human("info usernet"))
            for network_id, rule in update.forwards:
                if (network_id, rule) not in present:
                    answer = await monitor.human(f"hostfwd_add {network_id} {rule}")
                    if answer:
                        raise CprError("qmp-error", answer.strip())
    except CprError as error:
        if error.code != "qmp-error":
            raise
        raise CprError(
            "port-not-restored",
            f"The guest runs on the new QEMU, but a port could not be given to it: {error.message}",
            "See with `ss -nlp` who has the port now, end that, and run again.",
            qemu_description=error.qemu_description,
        ) from error


def _path_not_restored(path: str, why: str) -> CprError:
    return CprError(
        "path-not-restored",
        f"The guest runs on the new QEMU, but {path} could not be given to it: {why}.",
        "Mend the directory and run again.",
    )
