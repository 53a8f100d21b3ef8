#!/bin/sh
# What looks at the text only: ansible-lint at its production profile, the changelog, and
# whether the collection can be built.
set -eu

top=$(cd "$(dirname "$0")/../.." && pwd)
cd "$top"
export PATH="$top/.venv/bin:$PATH" ANSIBLE_HOME="$top/.cache/ansible"
ansible-lint --offline --profile production --strict
antsibull-changelog lint
ansible-galaxy collection build --force --output-path "$top/.cache/build" >/dev/null
echo "lint: passed"
