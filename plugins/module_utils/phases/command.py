# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Any QMP command, for any guests.

Private to the collection.
"""

from __future__ import annotations

from ansible_collections.vmfleet.cpr.plugins.module_utils import guests, process
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.task import Outcome, Task

# What only reads, in QEMU 7.2 to 11.1. Any other command counts as a change.
READ_ONLY = frozenset("""
    device-list-properties qom-get qom-list qom-list-get qom-list-properties qom-list-types
    query-accelerators query-acpi-ospm-status query-audiodevs query-balloon query-block
    query-block-exports query-block-jobs query-blockstats query-chardev query-chardev-backends
    query-colo-status query-command-line-options query-commands query-cpu-definitions
    query-cpu-model-baseline query-cpu-model-comparison query-cpu-model-expansion
    query-cpus-fast query-cryptodev query-current-machine query-dirty-rate query-display-options
    query-dump query-dump-guest-memory-capability query-fdsets query-firmware-log
    query-gic-capabilities query-hotpluggable-cpus query-hv-balloon-status-report
    query-iothreads query-jobs query-kvm query-machines query-memdev query-memory-devices
    query-memory-size-summary query-mice query-migrate query-migrate-capabilities
    query-migrate-parameters query-migrationthreads query-name query-named-block-nodes query-pci
    query-pr-managers query-qmp-schema query-replay query-rocker query-rocker-of-dpa-flows
    query-rocker-of-dpa-groups query-rocker-ports query-rx-filter query-s390x-cpu-polarization
    query-sev query-sev-attestation-report query-sev-capabilities query-sev-launch-measure
    query-sgx query-sgx-capabilities query-spice query-stats query-stats-schemas query-status
    query-target query-tpm query-tpm-models query-tpm-types query-uuid query-vcpu-dirty-limit
    query-version query-vm-generation-id query-vnc query-vnc-servers
    query-xen-replication-status query-yank trace-event-get-state x-debug-query-block-graph
    x-query-interrupt-controllers x-query-irq x-query-jit x-query-numa x-query-opcount
    x-query-profile x-query-ramblock x-query-rdma x-query-roms x-query-usb x-query-virtio
    x-query-virtio-queue-element x-query-virtio-queue-status
    x-query-virtio-vhost-queue-status
    """.split())

# They make QEMU load modules. One whose packages were upgraded under it finds the new build's, and aborts: seen with
# Debian's 10.0.13 under 11.1.3 (util/module.c).
LOADS_MODULES = frozenset(("device-list-properties", "qom-list-properties", "qom-list-types"))


async def execute_all(task: Task) -> list[Outcome]:
    """Execute one command on every guest; check mode executes those that only read.

    :raises CprError: as `guests.select`.
    """
    command: str = task.parameters["command"]
    changes = command not in READ_ONLY
    names, found = guests.select(task.guests, guests.by_name(process.find(), task.journal))

    async def one(name: str) -> Outcome:
        if command in LOADS_MODULES and found[name].on_disk != "same":
            raise CprError(
                "modules-replaced",
                f"{command} makes QEMU load its modules, and this one's binary is {found[name].on_disk}: with modules of"
                " another build it would abort, and the guest be lost.",
                "Move the guest to the new QEMU first.",
            )
        if changes and task.check_mode:
            return Outcome(name, True, f"{command} would be executed.", extra={"response": None})
        async with await guests.open_monitor(found[name]) as monitor:
            response = await monitor.execute(command, task.parameters["arguments"], task.timeout)
        return Outcome(name, changes, f"{command} was executed.", extra={"response": response})

    return await task.for_each(names, "command", one)
