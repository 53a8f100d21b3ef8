#!/bin/sh
# Runs the integration tests in two lanes side by side, since they mostly wait. Each lane has a view of its own of
# processes, mounts and locks: what looks for all guests of this machine must not find those of the other lane.
#
#     integration.sh [PYTEST ARGUMENT...]
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cd "$top"
logs=$top/.cache/integration
mkdir -p "$logs"
# About half of the time; all other files are in the second lane.
first="test_rolling test_modes test_host_reboot test_qemu_binary test_network"

lane() {
    # The shell is the lane's first process, which inherits the orphans, and reaps them.
    unshare --pid --fork --mount-proc --kill-child --mount --propagation private sh -c '
        mount -t tmpfs none /run/lock
        "$@"
        exit $?' sh .venv/bin/python -m pytest -p no:cacheprovider "$@"
}

inside= outside=
for name in $first; do
    inside="$inside tests/integration/$name.py"
    outside="$outside --ignore tests/integration/$name.py"
done
# shellcheck disable=SC2086
lane $inside "$@" >"$logs/first.log" 2>&1 </dev/null &
status=0
# shellcheck disable=SC2086
lane tests/integration $outside "$@" </dev/null || status=1
wait $! || status=1
cat "$logs/first.log"
exit $status
