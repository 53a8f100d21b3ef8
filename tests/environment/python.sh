#!/bin/sh
# Makes .venv with what requirements.txt pins, and the checkout in it as the collection
# vmfleet.cpr. Does nothing when that is there already.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
requirements=$top/tests/environment/requirements.txt
. "$top/tests/environment/apt.sh"

# find_python: the first Python 3.11 or later.
find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "The control node needs Python 3.11 or later, and none was found." >&2
    exit 1
}

need python3 python3
python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null || install_package python3-venv

stamp=$(cat "$requirements"; "$python" -V; echo "$top")
if [ "$(cat "$top/.venv/complete" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$top/.venv"
    "$python" -m venv "$top/.venv"
    "$top/.venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    packages=$("$top/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/ansible_collections/vmfleet"
    ln -sfn "$top" "$packages/ansible_collections/vmfleet/cpr"
    echo "$stamp" >"$top/.venv/complete"
fi
