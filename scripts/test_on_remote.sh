#!/usr/bin/env bash
# Copy this working tree to another machine, test it there and fetch one Markdown report.
set -euo pipefail
# shellcheck source=scripts/remote_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote_options.sh"

usage="usage: scripts/test_on_remote.sh [options] [-- settings of train.py]

Runs on the other machine: make install, doctor, make test, the hardware tests if the tree has any, and a short
training run; then fetches what they said as one Markdown report. Exit code 0: every step was well.

$remote_options_help
  --python PYTHON       makes the environment there               (REMOTE_PYTHON; default: python3)
  --accelerator NAME    of the training run: npu, cuda, cpu; default: what is there (REMOTE_ACCELERATOR)
  --devices N           of the training run; default: 1           (REMOTE_DEVICES)
  --steps N             optimizer steps of it; default: 20        (REMOTE_STEPS)
  --limit SECONDS       that each step may take; default: 7200    (REMOTE_LIMIT)
  --setup COMMAND       before everything, such as 'source …/set_env.sh' (REMOTE_SETUP)
  --report FILE         the report's name here; default: remote-report.md (REMOTE_REPORT)
  --no-sync             do not copy, test what is there
  --dry-run             say what would be done, and do nothing
  --help"

python=${REMOTE_PYTHON:-python3}
accelerator=${REMOTE_ACCELERATOR:-}
devices=${REMOTE_DEVICES:-1}
steps=${REMOTE_STEPS:-20}
limit=${REMOTE_LIMIT:-7200}
setup=${REMOTE_SETUP:-}
report=${REMOTE_REPORT:-remote-report.md}
sync=yes
dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
        --python | --accelerator | --devices | --steps | --limit | --setup | --report)
            [ $# -ge 2 ] || mistake "$1 needs a value."
            declare "${1#--}=$2"
            shift
            ;;
        --no-sync) sync="" ;;
        --dry-run) dry_run=yes ;;
        --help)
            echo "$usage"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *)
            take_remote_option "$@"
            [ "$taken" -gt 0 ] || mistake "$1 is no option."
            shift
            ;;
    esac
    shift
done
for number in "$devices" "$steps" "$limit"; do
    case $number in "" | *[!0-9]*) mistake "'$number' is no number." ;; esac
done
settle_remote

export REMOTE_HOST=$remote_host REMOTE_USER=$remote_user REMOTE_PORT=$remote_port REMOTE_PATH=$remote_path
export REMOTE_SSH_OPTIONS=$remote_ssh_options
command="cd $quoted_path && ${setup:+$setup && }bash scripts/remote_report.sh"
for word in "$python" "$accelerator" "$devices" "$steps" "$limit" "$@"; do
    command+=" $(printf %q "$word")"
done

if [ -n "$dry_run" ]; then
    [ -z "$sync" ] || "$root/scripts/sync_to_remote.sh" --dry-run
    echo "dry run: on $remote would run: $command"
    echo "dry run: the report would be fetched to $report"
    exit 0
fi
[ -z "$sync" ] || "$root/scripts/sync_to_remote.sh" | tail -n 1
code=0
"${ssh_command[@]}" "$remote" "rm -f -- $quoted_path/remote-report.md; $command" || code=$?
"${ssh_command[@]}" "$remote" "cat -- $quoted_path/remote-report.md" >"$report.part" || {
    rm -f "$report.part"
    echo "error: $remote wrote no report; its own words are above." >&2
    exit 1
}
mv "$report.part" "$report"
echo "report: $report"
exit "$code"
