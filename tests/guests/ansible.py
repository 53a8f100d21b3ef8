# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs Ansible from ``.venv`` against this machine, as a user would."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import sys
import typing as t

from tests.guests.guest import TOP

# What the hypervisor side runs on: the virtual environment's own base, which has no qemu.qmp.
HYPERVISOR_PYTHON = os.path.realpath(sys.executable)
_ENVIRONMENT = {**os.environ, "ANSIBLE_PIPELINING": "1", "ANSIBLE_NOCOLOR": "1"}


def live_update(
    binary: str,
    state: pathlib.Path,
    guests: t.Sequence[str],
    *words: str,
    python: str = HYPERVISOR_PYTHON,
    playbook: str = "live_update",
    **variables: t.Any,
) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the collection on this machine.

    :param state: the state directory.
    :param words: further arguments of ``ansible-playbook``.
    :param python: the Python that the modules run on.
    :param variables: further ``live_update_*`` variables, without the prefix.
    """
    words = (*_playbook(binary, state, guests, variables, playbook), *words)
    return _run("ansible-playbook", *words, python=python)


def start_live_update(
    binary: str,
    state: pathlib.Path,
    guests: t.Sequence[str],
    output: t.IO[str],
    environment: dict[str, str],
    **variables: t.Any,
) -> subprocess.Popen[str]:
    """Begin what `live_update` does, in a session of its own, its output to a file."""
    words = _playbook(binary, state, guests, variables)
    return subprocess.Popen(
        _command("ansible-playbook", *words), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=TOP,
        text=True, start_new_session=True, env={**_ENVIRONMENT, **environment},
    )  # fmt: skip


def _playbook(
    binary: str,
    state: pathlib.Path,
    guests: t.Sequence[str],
    variables: dict[str, t.Any],
    playbook: str = "live_update",
) -> list[str]:
    values = {"qemu_binary": binary, "state_directory": str(state), "guests": guests, **variables}
    extra = {f"live_update_{name}": value for name, value in values.items()}
    return [f"vmfleet.cpr.{playbook}", "-e", json.dumps(extra)]


def module(name: str, arguments: dict[str, t.Any], *words: str, python: str = HYPERVISOR_PYTHON) -> dict[str, t.Any]:
    """Run one module of the collection on this machine; what it returns.

    :param words: further arguments of ``ansible``.
    :param python: the Python that it runs on.
    """
    words = ("localhost", "-m", f"vmfleet.cpr.{name}", "-a", json.dumps(arguments), *words)
    answer = _run("ansible", *words, python=python)
    dummy, brace, text = answer.stdout.partition("=> {")
    if not brace:
        raise RuntimeError(answer.stdout + answer.stderr)
    return json.JSONDecoder().raw_decode("{" + text)[0]


def _run(program: str, *words: str, python: str = HYPERVISOR_PYTHON) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(program, *words, python=python),
        check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TOP, timeout=300,
        env=_ENVIRONMENT,
    )  # fmt: skip


def _command(program: str, *words: str, python: str = HYPERVISOR_PYTHON) -> list[str]:
    interpreter = f"ansible_python_interpreter={python}"
    return [str(TOP / ".venv" / "bin" / program), *words, "-i", "localhost,", "-c", "local", "-e", interpreter]


def playbook(
    name: str, inventory: dict[str, t.Any], variables: dict[str, t.Any], *more: str
) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the collection on other hosts.

    :param inventory: the variables of each host, by its name.
    :param more: further arguments of ``ansible-playbook``.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as stream:
        json.dump({"all": {"hosts": inventory}}, stream)
        stream.flush()
        words = [str(TOP / ".venv" / "bin" / "ansible-playbook"), f"vmfleet.cpr.{name}", "-i", stream.name]
        return subprocess.run(
            [*words, "-e", json.dumps(variables), *more],
            check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TOP, timeout=900,
            env=_ENVIRONMENT,
        )  # fmt: skip
