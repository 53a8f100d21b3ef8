#!/bin/sh
# ansible-test sanity on a copy of what git knows: ansible-test wants the collection under a
# path of its own, and no git checkout above it. Its virtual environments stay in .cache.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
home=$top/.cache/sanity
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
copy=$root/ansible_collections/vmfleet/cpr
python=$top/.venv/bin/python

mkdir -p "$copy" "$home/.ansible/test/cache"
(cd "$top" && git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null | tar -c -f - -T -) |
    tar -x -C "$copy" -f -

# ansible-test fetches a get-pip script from the network. Python brings pip along itself.
version=$("$python" -c 'import pathlib, re, ansible_test._internal.python_requirements as module
print(re.search(r"pip=.([0-9.]+)", pathlib.Path(module.__file__).read_text()).group(1).replace(".", "_"))')
echo "import ensurepip; ensurepip.bootstrap()" >"$home/.ansible/test/cache/get_pip_$version.py"
[ ! -f "$HOME/.config/pip/pip.conf" ] || export PIP_CONFIG_FILE="$HOME/.config/pip/pip.conf"

cd "$copy"
HOME=$home "$top/.venv/bin/ansible-test" sanity --venv --color no \
    --python "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" "$@"
