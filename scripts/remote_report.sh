#!/usr/bin/env bash
# Test the tree in which this lies, on this machine, and write remote-report.md; test_on_remote.sh runs it by ssh.
#
#   scripts/remote_report.sh PYTHON ACCELERATOR DEVICES STEPS LIMIT [settings of train.py]
#
# An empty ACCELERATOR takes what is there. Each step has LIMIT seconds; a failed one does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
[ $# -ge 5 ] || { echo "usage: scripts/remote_report.sh PYTHON ACCELERATOR DEVICES STEPS LIMIT [settings]" >&2; exit 2; }
python=$1 accelerator=$2 devices=$3 steps=$4 limit=$5
shift 5
if [ -z "$accelerator" ]; then
    accelerator=cpu
    if command -v npu-smi >/dev/null; then accelerator=npu; elif command -v nvidia-smi >/dev/null; then accelerator=cuda; fi
fi

report=remote-report.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
: >"$work/table"
: >"$work/words"

# step NAME COMMAND…: run it, keep its last lines, enter it into the table.
step() {
    local name=$1 code=0 begin=$SECONDS verdict=well
    shift
    echo "== $name: $*"
    timeout --kill-after=30 "$limit" "$@" >"$work/output" 2>&1 </dev/null || code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict="**ended after $limit s**"
    elif [ "$code" -ne 0 ]; then
        verdict="**failed** ($code)"
    fi
    [ "$code" -eq 0 ] || failed=1
    echo "| $name | $verdict | $((SECONDS - begin)) s |" >>"$work/table"
    # A report is Markdown: no colours, and a fence that no output holds.
    {
        # shellcheck disable=SC2016
        printf '\n## %s\n\n`%s`\n\n~~~~~~text\n' "$name" "$*"
        tail -n 60 "$work/output" | sed 's/\x1b\[[0-9;]*[A-Za-z]//g; s/^~~~~~~*/~~~~~/'
        printf '~~~~~~\n'
    } >>"$work/words"
    echo "   $verdict"
    return "$code"
}

if step install make install PYTHON="$python"; then
    step doctor .venv/bin/lightning-npu-tp doctor
    step "make test" make test
    if [ -d tests/hardware ]; then
        step "hardware tests" .venv/bin/python -m pytest tests/hardware -q
    else
        echo "| hardware tests | none in this tree | |" >>"$work/table"
    fi
    step "training, $steps steps" .venv/bin/python train.py "trainer.accelerator=$accelerator" \
        "trainer.devices=$devices" "trainer.max_steps=$steps" "hydra.run.dir=$work/run" "$@"
fi

{
    echo "# Test on $(hostname)"
    echo
    echo "$(date -u '+%Y-%m-%d %H:%M UTC'), $(uname -srm), accelerator $accelerator, $devices device(s)"
    echo
    echo "| step | result | time |"
    echo "|---|---|---|"
    cat "$work/table" "$work/words"
} >"$report"
exit "$failed"
