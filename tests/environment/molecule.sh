#!/bin/sh
# Runs scenarios of Molecule one after the other, and leaves nothing running, whatever becomes of them:
#
#     molecule.sh SCENARIO...
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
fleet=$top/.cache/molecule
cd "$top"
export PATH="$top/.venv/bin:$PATH" ANSIBLE_HOME="$top/.cache/ansible"
[ -t 1 ] || export NO_COLOR=1 ANSIBLE_FORCE_COLOR=0 # and no frames
export MOLECULE_EPHEMERAL_DIRECTORY="$top/.cache/molecule.state"

# stop: every machine that there is. Molecule stops none if a start failed, or if it was killed.
stop() {
    find "$fleet" -mindepth 2 -maxdepth 2 -name kind -printf '%h\0' | xargs -0 python -m tests.guests.fleet stop
    rm -rf "$fleet" "$MOLECULE_EPHEMERAL_DIRECTORY"
}

[ $# -gt 0 ] || { echo "usage: molecule.sh SCENARIO..." >&2; exit 2; }
mkdir -p "$fleet"
exec 9>"$fleet.lock"
flock 9
trap stop EXIT
trap 'exit 1' INT TERM HUP
stop
mkdir -p "$fleet"
for scenario in "$@"; do
    begun=$(date +%s)
    SCENARIO=$scenario molecule --base-config molecule/config.yml test --scenario-name "$scenario" --destroy always 9>&-
    echo "molecule: $scenario took $(($(date +%s) - begun)) s"
done
