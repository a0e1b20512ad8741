#!/usr/bin/env bash
# Copy this working tree to another machine, without data, checkpoints, environments and history.
set -euo pipefail
# shellcheck source=scripts/remote_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote_options.sh"

usage="usage: scripts/sync_to_remote.sh [options]

Copies this working tree with rsync over ssh. Data, checkpoints, runs, environments and .git stay here.

$remote_options_help
  --delete         remove files there that are no longer here; what is never copied is never removed, and nothing
                   where the folder there is no copy of this tree
  --dry-run        say what would be copied, and copy nothing
  --help"

dry_run=""
delete=""
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=yes ;;
        --delete) delete=yes ;;
        --help)
            echo "$usage"
            exit 0
            ;;
        *)
            take_remote_option "$@"
            [ "$taken" -gt 0 ] || mistake "$1 is no option."
            shift
            ;;
    esac
    shift
done
settle_remote
command -v rsync >/dev/null || { echo "error: rsync is not installed here." >&2; exit 1; }

# A leading / means the top of the tree: lit_models/data and conf/data are code.
options=(--archive --compress --protect-args --itemize-changes
    --exclude=/.git --exclude='/.venv*' --exclude=__pycache__ --exclude='*.egg-info' --exclude='.*_cache' --exclude=/build
    --exclude=/data --exclude=/runs --exclude=/sweeps --exclude=/multirun --exclude=/outputs --exclude=/lightning_logs
    --exclude=checkpoints --exclude='*.ckpt' --exclude='*.distcp' --exclude='*.safetensors' --exclude='*.bin'
    --exclude='*.parquet' --exclude=/remote-report.md)
[ -z "$dry_run" ] || options+=(--dry-run)
[ -z "$delete" ] || options+=(--delete)

if [ -z "$dry_run" ]; then
    resolve_remote_place "${delete:+--delete}" --make &&
        "${ssh_command[@]}" "$remote" "command -v rsync >/dev/null" || {
        echo "error: $remote cannot be reached, has no rsync, or will not have the folder $remote_path." >&2
        exit 1
    }
    rsync "${options[@]}" -e "${ssh_command[*]}" "$root/" "$remote:$remote_place/"
    echo "copied to $remote:$remote_place"
elif "${ssh_command[@]}" "$remote" "test -d $quoted_path"; then
    resolve_remote_place "${delete:+--delete}" "" || exit 1
    rsync "${options[@]}" -e "${ssh_command[*]}" "$root/" "$remote:$remote_place/"
    echo "dry run: nothing was copied to $remote:$remote_place"
else
    echo "dry run: $remote:$remote_path would be made, and every file of this tree copied"
fi
