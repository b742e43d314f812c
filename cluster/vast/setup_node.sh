#!/usr/bin/env bash
# Give a node the Python and the package versions of the machine that sets it up. An image that has them is left as it is.
set -euo pipefail
cd ~/pairscope
wanted=~/.pairscope/versions.json
if python3 -m cluster.vast.locked "$wanted"; then
    exit 0
fi
python=$(sed -n 's/.*"python": "\([0-9.]*\)".*/\1/p' "$wanted")
command -v uv > /dev/null || python3 -m pip install --quiet --disable-pip-version-check uv
# A Python of its own: Ray refuses a cluster whose machines differ in Python's minor version.
test -x ~/venv/bin/python || uv venv --quiet --python "$python" ~/venv
# Exactly the versions of the other machine, and all they need at the versions that the tests ran with.
exact=$(python3 -c 'import json, sys; print(" ".join(f"{k}=={v}" for k, v in json.load(open(sys.argv[1])).items() if k != "python"))' "$wanted")
# shellcheck disable=SC2086
uv pip install --quiet --python ~/venv/bin/python -c constraints.txt $exact "ray[default]" duckdb pyyaml numpy
grep -qs 'venv/bin' ~/.bashrc || echo 'export PATH=~/venv/bin:$PATH' >> ~/.bashrc
PATH=~/venv/bin:$PATH python3 -m cluster.vast.locked "$wanted"
