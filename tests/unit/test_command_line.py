# Copyright: vmfleet.cpr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's command line as data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmfleet.cpr.plugins.module_utils import command_line
from ansible_collections.vmfleet.cpr.plugins.module_utils.command_line import Option, Properties
from ansible_collections.vmfleet.cpr.plugins.module_utils.errors import CprError

VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
FLAGS = st.builds(
    lambda dashes, name: Option(dashes + name),
    st.sampled_from(["-", "--"]),
    st.sampled_from(sorted(command_line.OPTIONS_WITHOUT_ARGUMENT)),
)
WITH_VALUES = st.builds(
    lambda dashes, name, value: Option(dashes + name, value),
    st.sampled_from(["-", "--"]),
    st.sampled_from(sorted(command_line.OPTIONS_WITH_ARGUMENT)),
    VALUES,
)
IMAGES = st.builds(lambda value: Option("", value), VALUES.filter(lambda value: not value.startswith("-")))
KEYS = st.text("abcdefghij.-", min_size=1)


@given(st.lists(st.one_of(FLAGS, WITH_VALUES, IMAGES)))
def test_parsing_what_was_written_changes_nothing(options):
    words = command_line.write(options)
    assert command_line.parse(words) == options
    assert command_line.write(command_line.parse(words)) == words


TEXTS = VALUES.filter(lambda text: "=" not in text and text)
# QEMU itself can't tell a comma that begins a bare word from the one before it.
BARE = st.tuples(st.none(), TEXTS.filter(lambda text: text[0] != ","))


@given(st.lists(st.one_of(BARE, st.tuples(KEYS, TEXTS)), min_size=1))
def test_properties_survive_commas_in_values(pairs):
    assert Properties.read(str(Properties(pairs))).pairs == pairs


def test_an_unknown_option_is_named_and_refused():
    with pytest.raises(CprError, match="-frobnicate") as caught:
        command_line.parse(["-m", "1G", "-frobnicate", "x"])
    assert caught.value.code == "unknown-option"


def test_a_missing_argument_is_named():
    with pytest.raises(CprError, match="-device"):
        command_line.parse(["-device"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-name", "web1"], "web1"),
        (["-name", "guest=web1,process=qemu"], "web1"),
        (["--name", "web1,debug-threads=on"], "web1"),
        (["-name", "guest=a,,b"], "a,b"),
        (["-name", "first", "-name", "guest=last"], "last"),
        (["-m", "1G"], None),
    ],
)
def test_the_name_is_found_in_all_its_forms(words, name):
    assert command_line.guest_name(command_line.parse(words)) == name


def test_machine_options_in_pieces_are_one():
    options = command_line.parse(["-M", "q35,accel=kvm", "-machine", "memory-backend=ram0", "-machine", "type=pc"])
    properties = command_line.machine_properties(options)
    assert properties.get("type") == "pc"
    assert properties.get("accel") == "kvm"
    assert properties.get("memory-backend") == "ram0"


def test_json_is_read_like_key_value():
    (option,) = command_line.parse(["-device", '{"driver":"e1000","id":"n","multifunction":true,"addr":{"slot":3}}'])
    properties = command_line.read_properties(option)
    assert properties.get("driver") == "e1000"
    assert properties.get("addr.slot") == "3"
    assert properties.is_on("multifunction")


@pytest.mark.parametrize(
    "words",
    [
        ["-object", "secret,id=s,data=hunter2"],
        ["-object", '{"qom-type":"secret","id":"s","data":"hunter2"}'],
        ["-object", "secret,id=s,format=raw,data=hunter2"],
        ["-iscsi", "user=me,password=hunter2"],
        ["-spice", "port=5900,password=hunter2"],
        ["-drive", "file=https://me:hunter2@host/image.raw,format=raw"],
        ["-smbios", "type=11,value=io.systemd.credential:passwd.root=hunter2"],
        ["-fw_cfg", "name=opt/ignition,string=hunter2"],
    ],
)
def test_secrets_are_hidden_wherever_they_stand(words):
    options = command_line.parse(["-name", "web1", *words])
    assert command_line.secrets(options) == {"hunter2"}
    shown = command_line.masked_words(options)
    assert "hunter2" not in " ".join(shown)
    assert command_line.MASK in " ".join(shown)
    assert shown[:3] == ["-name", "web1", words[0]]
    assert command_line.mask("error: hunter2 is wrong", command_line.secrets(options)) == "error: ******** is wrong"


def test_a_secret_with_a_comma_is_hidden_as_it_is_written():
    options = command_line.parse(["-object", "secret,id=s,data=a,,b"])
    assert "a,,b" not in " ".join(command_line.masked_words(options))


def test_what_is_no_secret_is_shown():
    words = ["-vnc", ":1,password=on", "-object", "memory-backend-memfd,id=ram0,size=1G,share=on"]
    assert command_line.masked_words(command_line.parse(words)) == words
