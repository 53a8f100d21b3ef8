#!/bin/sh
# The unit tests on the control node's Python, and on Python 3.9, the oldest that a hypervisor
# may have, where one is found.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cd "$top"
.venv/bin/python -m pytest tests/unit

find_python39() {
    for candidate in python3.9 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.9.*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 9))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

python=$(find_python39)
if [ -z "$python" ]; then
    echo "unit: no Python 3.9 on this machine, so the tests ran on $(.venv/bin/python -V) only"
    exit 0
fi
if [ ! -f .venv-3.9/complete ]; then
    rm -rf .venv-3.9
    "$python" -m venv .venv-3.9
    # What runs on a hypervisor needs qemu.qmp only; ansible-core 2.15 is the last for 3.9.
    .venv-3.9/bin/pip install --quiet --disable-pip-version-check \
        ansible-core==2.15.13 hypothesis==6.141.1 jmespath==1.1.0 pytest==8.4.2 pytest-timeout==2.4.0 qemu.qmp==0.0.6
    packages=$(.venv-3.9/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/ansible_collections/vmfleet"
    ln -sfn "$top" "$packages/ansible_collections/vmfleet/cpr"
    touch .venv-3.9/complete
fi
.venv-3.9/bin/python -m pytest tests/unit
