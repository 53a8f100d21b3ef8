# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one place where Ansible and the phases meet.

Private to the collection.
"""

from __future__ import annotations

import asyncio
import signal
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.cpr.plugins.module_utils import detached, qmp_library
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.modes import AUTO, MODES
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Phase, Task

STATE_DIRECTORY = "/run/vmfleet-cpr"
CHECKPOINT_DIRECTORY = "/var/lib/vmfleet-cpr"


def guests_argument_spec(**options: t.Any) -> dict[str, t.Any]:
    """The arguments that every module has, and its own."""
    return {
        "guests": {"type": "list", "elements": "str", "required": True},
        "concurrency": {"type": "int", "default": 4},
        "timeout": {"type": "float", "default": 30.0},
        "state_directory": {"type": "path", "default": STATE_DIRECTORY},
        "qmp_library": {"type": "str", "no_log": True},
        "run": {"type": "dict"},
        "ended_runs": {"type": "list", "elements": "str", "no_log": False},
        **options,
    }


def wishes_argument_spec() -> dict[str, t.Any]:
    """The arguments of `handshake.Wishes`."""
    return {
        "capabilities": {"type": "dict", "default": {}},
        "parameters": {"type": "dict", "default": {}},
        "when_missing": {"type": "str", "choices": ["fail", "drop"], "default": "fail"},
    }


def mode_argument_spec() -> dict[str, t.Any]:
    """The arguments that choose the mode of each guest; see `modes.choose`."""
    return {
        "mode": {"type": "str", "choices": [AUTO, *MODES], "default": AUTO},
        "adopt": {"type": "bool", "default": True},
        "accept_differences": {"type": "list", "elements": "str", "default": []},
    }


def run(
    module: AnsibleModule, function: t.Callable[[Task], t.Awaitable[list[Outcome]]], *, outlives_caller: bool = False
) -> t.NoReturn:
    """Run a whole-host function and return its guests' outcomes to Ansible.

    A failure that concerns the whole host returns no ``guests``. Where other runs of Ansible
    have updates of these guests under way, nothing is done before the control node has said
    which of them have ended.

    :param outlives_caller: whether it runs in a process that goes on when the module is killed.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work(is_abandoned: t.Callable[[], bool]) -> dict[str, t.Any]:
        task = Task(module.params, module.check_mode, is_abandoned)
        try:
            return _result(asyncio.run(_as_coroutine(function, task)), task.warnings, module._diff)
        except CprError as error:
            return {"failed": True, "msg": str(error), "error": error.as_dict()}

    try:
        _check_arguments(module.params)
        qmp_library.make_available(module.params["qmp_library"], module.tmpdir)
        if module.params["run"] and module.params["ended_runs"] is None and not module.check_mode:
            others = Task(module.params, check_mode=False).other_runs()
            if others:
                module.exit_json(other_runs=others)
        result = detached.run(work) if outlives_caller and not module.check_mode else work(lambda: False)
    except CprError as error:
        module.fail_json(msg=str(error), error=error.as_dict())
    for warning in result.pop("warnings", []):
        module.warn(warning)
    (module.fail_json if result.pop("failed") else module.exit_json)(**result)


def _result(outcomes: list[Outcome], warnings: list[str], show_diff: bool) -> dict[str, t.Any]:
    result: dict[str, t.Any] = {
        "failed": any(outcome.error for outcome in outcomes),
        "changed": any(outcome.changed for outcome in outcomes),
        "guests": [outcome.as_dict() for outcome in outcomes],
    }
    of_guests = [f"{outcome.guest}: {warning}" for outcome in outcomes for warning in outcome.warnings]
    if warnings or of_guests:
        result["warnings"] = [*warnings, *of_guests]
    diffs = [outcome.diff for outcome in outcomes if outcome.diff]
    if diffs and show_diff:
        result["diff"] = diffs
    failures = [outcome.error for outcome in outcomes if outcome.error]
    if failures:
        result.update(msg=" ".join(map(str, failures)), error=failures[0].as_dict())
    return result


async def _as_coroutine(function: t.Callable[[Task], t.Awaitable[list[Outcome]]], task: Task) -> list[Outcome]:
    return await function(task)


def _check_arguments(parameters: t.Mapping[str, t.Any]) -> None:
    for name, value in parameters.items():
        if name.endswith(("concurrency", "timeout", "_limit")) and value <= 0:
            raise CprError("bad-argument", f"{name} is {value:g}, and must be more than 0.")


def run_phase(
    module: AnsibleModule, phase: Phase, *, done: t.Container[str | None], would: str, **options: t.Any
) -> t.NoReturn:
    """Run a phase that works on guests whose update has begun; see `Task.for_each_update`."""

    async def every(task: Task) -> list[Outcome]:
        return await task.for_each_update(phase, done=done, would=would, **options)

    run(module, every)
