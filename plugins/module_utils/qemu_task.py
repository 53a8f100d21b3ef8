# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules of the versions of QEMU on a host share: their arguments, and what they return.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import os
import stat
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils import (
    commands,
    guests,
    process,
    qemu_add,
    qemu_binary,
    qemu_modules,
    qemu_store,
    qemu_versions,
    qmp_library,
)
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.qemu_versions import Judgement
from ansible_collections.vmfleet.cpr.plugins.module_utils.runner import CHECKPOINT_DIRECTORY, STATE_DIRECTORY

DIRECTORY = "/opt/qemu"
EMULATOR = "qemu-system-x86_64"
# Seconds for a binary to say its version.
_ANSWER_TIMEOUT = 5.0

_ON_DISK = {"same": "", "replaced": ", where another one is by now", "deleted": ", which was deleted"}
_WARNING = (
    "The guests {} run the build that is to be replaced. Until they are on another one, plug nothing into them that"
    " comes from a module (usb-host, virtio-gpu, disks by ssh, curl or rbd), and send them no qom-list-types: their QEMU"
    " would take the new build's modules for its own, and may abort then (seen with 10.0)."
)

Work = t.Callable[[t.Mapping[str, t.Any], bool], t.Awaitable[dict[str, t.Any]]]


def argument_spec(**options: t.Any) -> dict[str, t.Any]:
    """The arguments that each of these modules has, and its own."""
    return {
        "directory": {"type": "path", "default": DIRECTORY},
        "emulator": {"type": "str", "default": EMULATOR},
        "qmp_library": {"type": "str", "no_log": True},
        "run": {"type": "dict"},
        **options,
    }


def keep_argument_spec() -> dict[str, t.Any]:
    """The arguments that say what may be removed."""
    return {
        "keep": {"type": "int", "default": 2},
        "default": {"type": "path"},
        "protect": {"type": "list", "elements": "path", "default": []},
        "state_directories": {
            "type": "list",
            "elements": "path",
            "default": [STATE_DIRECTORY, CHECKPOINT_DIRECTORY],
        },
    }


def run(module: AnsibleModule, work: Work) -> t.NoReturn:
    """Do the work, and return to Ansible what it returns, or its failure."""
    try:
        _check_arguments(module.params)
        qmp_library.make_available(module.params["qmp_library"], module.tmpdir)
        result = asyncio.run(_as_coroutine(work, module))
    except CprError as error:
        module.fail_json(msg=str(error), error=error.as_dict())
    except OSError as error:
        refused = CprError(
            "host-error",
            f"The host refused it: {error}.",
            "Mend that, or run the task with more rights (become), and run again.",
        )
        module.fail_json(msg=str(refused), error=refused.as_dict())
    for warning in result.pop("warnings", []):
        module.warn(warning)
    module.exit_json(**result)


async def _as_coroutine(work: Work, module: AnsibleModule) -> dict[str, t.Any]:
    return await work(module.params, module.check_mode)


def _check_arguments(parameters: t.Mapping[str, t.Any]) -> None:
    if not os.path.isabs(parameters["directory"]):
        raise CprError("bad-argument", f"directory is {parameters['directory']}, and must be an absolute path.")
    if not parameters["emulator"] or "/" in parameters["emulator"]:
        raise CprError("bad-argument", f"emulator is {parameters['emulator']!r}, and must be the name of a file.")
    if parameters.get("keep", 0) < 0:
        raise CprError("bad-argument", f"keep is {parameters['keep']}, and must not be less than 0.")


async def inform(parameters: t.Mapping[str, t.Any], dummy: bool) -> dict[str, t.Any]:
    """What there is, who uses it, and what new guests get."""
    directory, emulator = parameters["directory"], parameters["emulator"]
    store = qemu_store.look(directory, emulator, parameters["state_directories"])
    link = qemu_store.default_link(directory, emulator)
    target = os.readlink(link) if os.path.islink(link) else None
    default = parameters["default"] or target and os.path.join(os.path.dirname(link), target)
    judged = store.judge(parameters["keep"], default, parameters["protect"])
    # Where new guests have no default yet it is about to be that, most likely.
    compared = default or parameters["qemu_binary"]
    result: dict[str, t.Any] = {
        "changed": False,
        "versions": _versions(store, judged),
        "default": default,
        "default_link": link,
        "guests": await _guests(store, compared),
    }
    if parameters["qemu_binary"]:
        binary = await qemu_binary.probe(parameters["qemu_binary"])
        path = parameters["qemu_binary"]
        result["binary"] = {
            "path": path,
            "real_path": os.path.realpath(path),
            "version": binary.offer.version_text,
        }
    return result


def _versions(store: qemu_store.Store, judged: t.Mapping[str, Judgement]) -> list[dict[str, t.Any]]:
    return [
        {
            "name": version.name.replace(qemu_versions.UNFINISHED, "", 1),
            "path": version.path,
            "binary": version.binary,
            "version": version.qemu_version,
            "complete": version.complete,
            "used_by": list(version.used_by),
            "named_by": list(version.named_by),
            "removable": judged[version.name].removable,
            "reason": judged[version.name].reason,
        }
        for version in store.versions
    ]


async def _guests(store: qemu_store.Store, default: str | None) -> list[dict[str, t.Any]]:
    """The running guests, what they run, and whether that is the default."""
    wanted = process.file_id(default) if default else None
    versions = {process.file_id(version.binary): version.qemu_version for version in store.versions}
    versions = {identity: version for identity, version in versions.items() if version}
    found = []
    for qemu in process.find():
        name = guests.name_of(qemu)
        if qemu.executable_id not in versions:
            versions[qemu.executable_id] = await _version_of(qemu)
        version = versions[qemu.executable_id]
        found.append(
            {
                "name": name or f"process {qemu.identity.pid}",
                "pid": qemu.identity.pid,
                "binary": qemu.executable,
                "binary_on_disk": qemu.on_disk,
                "version": version,
                "runs": f"QEMU {version or 'of unknown version'} from {qemu.executable}{_ON_DISK[qemu.on_disk]}",
                "elsewhere": qemu.executable_id != wanted,
            }
        )
    return sorted(found, key=lambda guest: (guest["name"], guest["pid"]))


async def _version_of(qemu: process.QemuProcess) -> str | None:
    """What the binary that a guest runs says, also if it was replaced or deleted; None if it can't be asked.

    The guest itself is not: whoever updates it may want its monitor at this moment.
    """
    path = f"{process.PROC}/{qemu.identity.pid}/exe"
    try:
        status = os.stat(path)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None  # somebody's own, which is nothing to run with our rights
        return qemu_versions.build_of(await commands.run(path, "-version", timeout=_ANSWER_TIMEOUT))[0]
    except (CprError, OSError):
        return None


async def add(parameters: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """Let a version be in the store."""
    build = ""
    if parameters["installed"]:
        wish, build = await qemu_add.of_installed(parameters["directory"], parameters["installed"])
    else:
        wish = qemu_add.Wish(
            directory=parameters["directory"],
            name=parameters["version"],
            emulator=parameters["emulator"],
            archive=parameters["archive"],
            checksum=parameters["checksum"],
            packages=tuple(parameters["packages"] or ()),
            described_as=tuple(parameters["described_as"] or ()),
            only_plan=parameters["only_plan"],
        )
    made = await qemu_add.make(wish, check_mode)
    modules, endangered, warnings = [], [], []
    if parameters["installed"]:
        endangered = qemu_modules.endangered(wish.executables)
        if endangered:
            warnings = [_WARNING.format(", ".join(endangered))]
        missing = qemu_modules.missing(parameters["installed"], build, wish.executables)
        modules = sorted(map(os.path.basename, missing))
        if not check_mode:
            modules = await qemu_modules.keep(parameters["installed"], build, wish.executables)
    if wish.source == qemu_add.UNPACKED and check_mode and not made.present and qemu_add.lacks_patchelf():
        warnings.append("There is no patchelf on this host, which packages that bring libraries of their own need.")
    version = (qemu_store.read_marker(wish.path) or {}).get("qemu_version")
    if version and not qemu_versions.fits(wish.name, version):
        warnings.append(f"{wish.path} is QEMU {version}, whatever it is called: was that the release that was meant?")
    return {
        "changed": (not made.present and not wish.only_plan) or bool(modules),
        "present": made.present,
        "path": wish.path,
        "binary": wish.binary,
        "modules": modules,
        "endangered": endangered,
        "message": made.message,
        "warnings": warnings,
    }


async def remove(parameters: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """Remove what nobody needs any more."""
    store, judged, modules = await qemu_store.remove(
        parameters["directory"],
        parameters["emulator"],
        parameters["state_directories"],
        keep=parameters["keep"],
        default=parameters["default"] or _present_default(parameters),
        protected=parameters["protect"],
        check_mode=check_mode,
    )
    versions = _versions(store, judged)
    return {
        "changed": any(version["removable"] for version in versions) or bool(modules),
        "removed": [version["path"] for version in versions if version["removable"]] + modules,
        "kept": [
            {key: version[key] for key in ("name", "path", "reason")}
            for version in versions
            if not version["removable"]
        ],
    }


def _present_default(parameters: t.Mapping[str, t.Any]) -> str | None:
    link = qemu_store.default_link(parameters["directory"], parameters["emulator"])
    return os.path.realpath(link) if os.path.islink(link) else None
