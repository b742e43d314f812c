#!/usr/bin/env bash
# Give a node the Python and the package versions of the machine that sets it up. An image that has them is left as it is.
# Arguments are further packages, as pip takes them; constraints.txt holds for those that it names.
set -euo pipefail
cd ~/pairscope
wanted=~/.pairscope/versions.json

# The command that jobs call: the code in the job's own folder, else that which was sent here.
mkdir -p ~/.pairscope/bin
cat > ~/.pairscope/bin/pairscope << 'END'
#!/bin/sh
PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$HOME/pairscope" exec python3 -m pairscope "$@"
END
chmod +x ~/.pairscope/bin/pairscope
grep -qs '\.pairscope/bin' ~/.bashrc || echo 'export PATH=~/.pairscope/bin:$PATH' >> ~/.bashrc

if [ $# = 0 ] && python3 -m cluster.vast.locked "$wanted"; then
    python3 -m cluster.vast.cards
    exit 0
fi

# Bytes that came in so far, over all cards but loopback.
received() {
    awk 'NR > 2 && $1 !~ /^lo:/ { sub(/^[^:]*:/, ""); n += $1 } END { printf "%.0f", n }' /proc/net/dev
}
before=$(received)
SECONDS=0

if ! command -v uv > /dev/null; then
    # Python of a distribution refuses at first; this container is ours alone.
    python3 -m pip install --quiet --disable-pip-version-check uv ||
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --disable-pip-version-check uv
fi
uv() {
    if type -P uv > /dev/null; then command uv "$@"; else python3 -m uv "$@"; fi
}
# A Python of its own: Ray refuses a cluster whose machines differ in Python's minor version.
python=$(sed -n 's/.*"python": "\([0-9.]*\)".*/\1/p' "$wanted")
if ! ~/venv/bin/python -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$python'.split('.'))))" 2> /dev/null; then
    rm -rf ~/venv
    uv venv --quiet --python "$python" ~/venv
fi
# All that pairscope needs, exactly as the other machine has it where that matters, else as the tests ran with it.
exact=$(~/venv/bin/python -c 'import json, sys; print(*(f"{k}=={v}" for k, v in json.load(open(sys.argv[1])).items() if k != "python"))' "$wanted")
# shellcheck disable=SC2086
uv pip install --quiet --python ~/venv/bin/python -c constraints.txt -r pyproject.toml --extra vast $exact "$@"
grep -qs 'venv/bin' ~/.bashrc || echo 'export PATH=~/venv/bin:$PATH' >> ~/.bashrc
PATH=~/venv/bin:$PATH python3 -m cluster.vast.locked "$wanted"
PATH=~/venv/bin:$PATH python3 -m cluster.vast.cards
# Compiled now: a node whose agent has not imported all within 15 s of its start is given up by Ray.
~/venv/bin/python -m compileall -q ~/venv/lib/python*/site-packages/ray/dashboard > /dev/null 2>&1 || true

# How fast this machine loads, for those who choose machines. A few megabytes say nothing.
loaded=$(($(received) - before))
if [ "$loaded" -gt 200000000 ]; then
    printf '{"bytes": %s, "seconds": %s}\n' "$loaded" "$SECONDS" > ~/.pairscope/download.json
fi
