# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is ready for a live update, on data recorded from real QEMUs."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line, handshake, readiness
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError
from ansible_collections.vmfleet.cpr.plugins.module_utils.memory import Block
from ansible_collections.vmfleet.cpr.plugins.module_utils.offer import Binary, Offer, read_schema

CAPABILITIES = frozenset({"events", "return-path", "multifd", "xbzrle"})
OFFER = Offer(
    (10, 0, 2), "x86_64", frozenset({"normal", "cpr-reboot", "cpr-transfer"}), CAPABILITIES, frozenset({"mode"})
)
NEW_OFFER = dataclasses.replace(OFFER, version=(11, 1, 3), modes=OFFER.modes | {"cpr-exec"})
BINARY = Binary("/new", (1, 2), NEW_OFFER, frozenset({"pc-q35-10.0", "q35"}))
READY = readiness.Observation(
    machine_type="pc-q35-10.0",
    run_state="running",
    migration=None,
    memory=[Block("ram0", 1 << 30, shared=True)],
    aux_ram_share=True,
    offer=OFFER,
)


def codes(mode="cpr-transfer", **changes):
    return [blocker.code for blocker in readiness.blockers(dataclasses.replace(READY, **changes), mode)]


def test_a_guest_that_was_started_for_it_is_ready():
    assert codes() == []
    assert codes(run_state="paused") == []
    assert codes(migration="failed") == codes(migration="cancelled") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"memory": [Block("pc.ram", 1)], "aux_ram_share": False},
            ["memory-not-shared"],
        ),
        ({"aux_ram_share": False}, ["aux-ram-not-shared"]),
        ({"aux_ram_share": None}, ["aux-ram-not-shared"]),
        ({"migration": "active"}, ["already-migrating"]),
        ({"migration": "setup"}, ["already-migrating"]),
        ({"run_state": "postmigrate"}, ["run-state"]),
        ({"block_jobs": ["mirror0"]}, ["block-job-running"]),
        ({"run_state": "io-error"}, ["run-state"]),
        ({"offer": dataclasses.replace(OFFER, modes=frozenset())}, ["mode-missing"]),
    ],
)
def test_what_stands_in_the_way_is_named(changes, expected):
    assert codes(**changes) == expected


def test_the_hint_says_what_the_command_line_would_need():
    private = dataclasses.replace(READY, memory=[Block("pc.ram", 512 << 20)])
    (blocker,) = readiness.blockers(private, "cpr-transfer")
    assert "memory-backend-memfd,id=ram0,size=512M,share=on" in blocker.hint
    assert "aux-ram-share=on" in blocker.hint


def test_cpr_reboot_takes_private_memory_and_cpr_exec_does_not():
    private = [Block("pc.ram", 1)]
    assert codes("cpr-reboot", memory=private) == []
    assert "memory-not-shared" in codes("cpr-exec", memory=private)


@pytest.mark.parametrize(
    ("observation", "binary", "expected"),
    [
        (READY, BINARY, []),
        (dataclasses.replace(READY, machine_type="pc-q35-2.12"), BINARY, ["machine-type-missing"]),
        (READY, dataclasses.replace(BINARY, offer=dataclasses.replace(NEW_OFFER, version=(9, 2, 0))), ["older-qemu"]),
        (READY, dataclasses.replace(BINARY, offer=dataclasses.replace(NEW_OFFER, modes=frozenset())), ["mode-missing"]),
        (
            READY,
            dataclasses.replace(
                BINARY, offer=dataclasses.replace(NEW_OFFER, architecture="aarch64"), machine_types=frozenset()
            ),
            ["binary-wrong-architecture"],
        ),
    ],
)
def test_a_binary_that_does_not_fit_is_refused(observation, binary, expected):
    assert [blocker.code for blocker in readiness.binary_blockers(observation, binary)] == expected


def test_a_binary_without_a_device_or_kvm_is_refused_and_a_deprecated_machine_type_is_not():
    observation = dataclasses.replace(READY, device_types=frozenset({"ich9-ahci", "igb"}), kvm=True)
    binary = dataclasses.replace(BINARY, device_types=frozenset({"ich9-ahci"}), kvm=False)
    missing, accelerator = readiness.binary_blockers(observation, binary)
    assert missing.code == "device-missing" and ": igb." in missing.message
    assert accelerator.code == "accelerator-missing"
    old = dataclasses.replace(BINARY, deprecated=frozenset({"pc-q35-10.0"}))
    assert readiness.binary_blockers(READY, old) == []
    assert [warning.code for warning in readiness.warnings(READY, old)] == ["machine-type-deprecated"]
    paused = dataclasses.replace(READY, run_state="paused")
    assert [warning.code for warning in readiness.warnings(paused, BINARY)] == ["guest-paused"]


def test_an_older_qemu_is_in_the_way_of_all_modes_but_cpr_reboot():
    older = dataclasses.replace(BINARY, offer=dataclasses.replace(NEW_OFFER, version=(9, 2, 0)))
    assert readiness.binary_blockers(READY, older, "cpr-reboot") == []
    for mode in ("cpr-transfer", "cpr-exec"):
        assert [blocker.code for blocker in readiness.binary_blockers(READY, older, mode)] == ["older-qemu"]


@pytest.mark.parametrize(
    ("words", "kept", "moved", "expected"),
    [
        (["-sandbox", "on"], {}, False, []),
        (["-sandbox", "on,obsolete=deny,spawn=deny"], {}, False, ["sandbox-denies-exec"]),
        (["-runas", "nobody"], {}, False, ["exec-changes-user"]),
        (["-run-with", "user=nobody"], {}, False, ["exec-changes-user"]),
        ([], {12: "/dev/net/tun"}, False, ["exec-keeps-descriptors"]),
        ([], {12: "/memfd:ram0 (deleted)", 13: "anon_inode:kvm-vm"}, False, []),
        ([], {}, True, ["exec-relative-paths"]),
        (["-audiodev", "alsa,id=a"], {}, False, ["exec-not-rehearsed"]),
        (["-display", "gtk", "-netdev", "l2tpv3,id=n"], {}, False, ["exec-not-rehearsed"]),
        (["-audiodev", "none,id=a", "-netdev", "user,id=n"], {}, False, []),
    ],
)
def test_what_would_fail_after_exec_is_found_before(words, kept, moved, expected):
    found = readiness.exec_blockers(command_line.parse(words), kept, moved=moved)
    assert [blocker.code for blocker in found] == expected


def test_memory_that_the_old_qemu_would_empty_is_in_the_way():
    file = Block("ram0", 1 << 30, shared=True, path="/dev/shm/ram0", discarded=True)
    assert codes(memory=[file]) == ["memory-discarded"]
    assert codes("cpr-exec", memory=[file], offer=NEW_OFFER) == []  # one process: nothing ends
    observation = dataclasses.replace(READY, memory=[file])
    assert not observation.memory_in_place and observation.writes_its_memory == 1 << 30
    assert dataclasses.replace(READY, memory=[dataclasses.replace(file, discarded=False)]).memory_in_place


def test_a_copy_needs_no_mode_and_no_shared_memory_but_a_qemu_that_can_be_asked():
    old = dataclasses.replace(OFFER, version=(6, 2, 0), modes=frozenset())
    assert codes("precopy", offer=old, memory=[Block("pc.ram", 1)], aux_ram_share=None, kvm=True) == []
    assert codes("precopy", offer=old) == ["tcg-precopy"]
    assert codes("precopy") == []  # under TCG too, from 10.0 on
    assert codes("precopy", offer=dataclasses.replace(old, version=(6, 1, 9)), kvm=True) == ["mode-missing"]


def test_qemus_own_reasons_are_told_for_their_mode_only():
    observation = dataclasses.replace(READY, blocked_reasons={"cpr-transfer": ["no"], "cpr-reboot": []})
    (blocker,) = readiness.blockers(observation, "cpr-transfer")
    assert (blocker.code, blocker.qemu_description) == ("migration-blocked", "no")
    assert readiness.blockers(observation, "cpr-reboot") == []


def test_while_something_migrates_no_mode_is_tried_and_none_is_said_to_be_missing():
    assert not readiness.may_try_modes("running", "active") and not readiness.may_try_modes("inmigrate", None)
    busy = dataclasses.replace(READY, migration="active", offer=dataclasses.replace(OFFER, modes=frozenset()))
    assert [blocker.code for blocker in readiness.blockers(busy, "cpr-transfer")] == ["already-migrating"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-device", "e1000,netdev=n,id=x,bus=pci.0,addr=3"], None),
        (["-device", '{"driver":"e1000","netdev":"n","speed":1000}'], "e1000 does not have .*: speed"),
        (["-device", "virtio-blk,drive=d,future=on"], None),  # an alias: nobody knows of what
        (["-machine", "q35,accel=kvm,kernel_irqchip=split,smm=on,memory-backend=m"], None),
        (["-M", "q35", "-machine", "wdat=on,smm=off"], "pc-q35-10.0-machine does not have .*: wdat"),
        (["-netdev", "user,id=n"], None),
    ],
)
def test_what_a_command_line_sets_and_a_binary_does_not_know(words, told):
    properties = {"e1000": {"netdev", "addr", "mac"}, "pc-q35-10.0-machine": {"smm", "memory-backend"}}
    found = readiness.unknown_properties(command_line.parse(words), "pc-q35-10.0-machine", properties)
    assert [blocker.code for blocker in found] == (["property-missing"] if told else [])
    assert not told or re.search(told, found[0].message)


def test_only_the_required_capabilities_are_on_and_only_common_ones_are_agreed():
    new = dataclasses.replace(NEW_OFFER, capabilities=CAPABILITIES - {"xbzrle"} | {"mapped-ram"})
    assert handshake.agree(OFFER, new).capabilities == {"events": True, "multifd": False, "return-path": True}


def test_a_missing_required_capability_is_refused():
    with pytest.raises(CprError, match="new QEMU.*return-path"):
        handshake.agree(OFFER, dataclasses.replace(NEW_OFFER, capabilities=frozenset({"events"})))


def test_wishes_are_set_if_both_ends_have_them():
    wishes = handshake.Wishes({"multifd": True, "xbzrle": False}, {"max-bandwidth": 7})
    new = dataclasses.replace(NEW_OFFER, parameters=frozenset({"mode", "max-bandwidth"}))
    old = dataclasses.replace(OFFER, parameters=new.parameters)
    agreement = handshake.agree(old, new, wishes)
    assert agreement.capabilities == {"events": True, "multifd": True, "return-path": True, "xbzrle": False}
    assert agreement.parameters == {"max-bandwidth": 7} and not agreement.dropped


@pytest.mark.parametrize(
    ("wishes", "code"),
    [
        (handshake.Wishes({"mapped-ram": True}), "capability-missing"),
        (handshake.Wishes({}, {"max-postcopy": 1}), "parameter-missing"),
        (handshake.Wishes({"events": False}), "bad-argument"),
        (handshake.Wishes({}, {"mode": "normal"}), "bad-argument"),
        (handshake.Wishes({"pause-before-switchover": True}), "bad-argument"),
    ],
)
def test_wishes_that_an_end_lacks_are_refused_or_dropped(wishes, code):
    with pytest.raises(CprError) as caught:
        handshake.agree(OFFER, NEW_OFFER, wishes)
    assert caught.value.code == code
    if code != "bad-argument":
        agreement = handshake.agree(OFFER, NEW_OFFER, dataclasses.replace(wishes, when_missing="drop"))
        assert agreement.parameters == handshake.PARAMETERS and "mapped-ram" not in agreement.capabilities
        assert len(agreement.dropped) == 2 and "10.0.2" in agreement.dropped[0] and "11.1.3" in agreement.dropped[1]


def test_a_capability_is_on_or_off_in_any_of_ansibles_words():
    given = {"capabilities": {"xbzrle": "no", "multifd": "on"}, "parameters": {}, "when_missing": "fail"}
    assert handshake.Wishes.of(given).capabilities == {"xbzrle": False, "multifd": True}
    with pytest.raises(CprError, match="bad-argument"):
        handshake.Wishes.of({**given, "capabilities": {"xbzrle": "perhaps"}})


def test_what_differs_is_set_and_remembered():
    current = [
        {"capability": "events", "state": False},
        {"capability": "multifd", "state": True},
        {"capability": "only-here", "state": True},
        {"capability": "return-path", "state": True},
    ]
    agreed = handshake.agree(OFFER, NEW_OFFER).capabilities
    changes = handshake.capabilities_to_set(current, agreed)
    assert changes == [
        {"capability": "events", "state": True},
        {"capability": "multifd", "state": False},
        {"capability": "only-here", "state": False},
    ]
    assert handshake.capabilities_to_restore(current, changes) == current[:3]


def test_a_schema_without_mig_mode_offers_no_mode():
    schema = [
        {"name": "migrate-set-capabilities", "meta-type": "command", "arg-type": "1"},
        {"name": "1", "meta-type": "object", "members": [{"name": "capabilities", "type": "[2]"}]},
        {"name": "[2]", "meta-type": "array", "element-type": "2"},
        {
            "name": "2",
            "meta-type": "object",
            "members": [{"name": "capability", "type": "3"}, {"name": "state", "type": "bool"}],
        },
        {"name": "3", "meta-type": "enum", "values": ["events", "return-path"]},
        {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "4"},
        {"name": "4", "meta-type": "object", "members": [{"name": "max-bandwidth", "type": "int"}]},
    ]
    offer = read_schema((7, 2, 22), "x86_64", schema)
    assert offer.modes == frozenset()
    assert offer.capabilities == {"events", "return-path"}
    assert offer.parameters == {"max-bandwidth"}
    assert offer.version_text == "7.2.22"
