# Options that the two scripts for a remote machine share; sourced, not run.
# shellcheck shell=bash disable=SC2034

remote_options_help='  --host HOST      the machine, as ssh knows it          (REMOTE_HOST)
  --user USER      who to be there; default: ssh decides (REMOTE_USER)
  --port PORT      of its sshd; default: ssh decides     (REMOTE_PORT)
  --path PATH      folder there, relative to the home    (REMOTE_PATH; default: the name of this folder)
  --ssh OPTIONS    further options of ssh, such as "-i KEY" or "-o ProxyJump=HOST" (REMOTE_SSH_OPTIONS)'

remote_host=${REMOTE_HOST:-}
remote_user=${REMOTE_USER:-}
remote_port=${REMOTE_PORT:-}
remote_ssh_options=${REMOTE_SSH_OPTIONS:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
remote_path=${REMOTE_PATH:-$(basename "$root")}
taken=0

mistake() {
    echo "error: $1 See --help." >&2
    exit 2
}

# Sets `taken` to the number of words that were an option of these with its value; 0 for another word.
take_remote_option() {
    taken=2
    case $1 in
        --host | --user | --port | --path | --ssh)
            [ $# -ge 2 ] || mistake "$1 needs a value."
            ;;
    esac
    case $1 in
        --host) remote_host=$2 ;;
        --user) remote_user=$2 ;;
        --port) remote_port=$2 ;;
        --path) remote_path=$2 ;;
        --ssh) remote_ssh_options=$2 ;;
        *) taken=0 ;;
    esac
}

# To be called when all options are read. Makes `ssh_command` (words) and `remote` (user@host).
settle_remote() {
    [ -n "$remote_host" ] || mistake "no machine is named: pass --host HOST or export REMOTE_HOST."
    case $remote_host in -*) mistake "--host $remote_host is no host." ;; esac
    case $remote_port in *[!0-9]*) mistake "--port $remote_port is no port." ;; esac
    # shellcheck disable=SC2088
    case $remote_path in
        "" | / | . | .. | "~" | "~/") mistake "--path '$remote_path' would mix the files with others: name a folder." ;;
    esac
    # A leading ~/ would not be expanded there once the path is quoted; relative paths begin at the home anyway.
    remote_path=${remote_path#\~/}
    ssh_command=(ssh)
    [ -z "$remote_port" ] || ssh_command+=(-p "$remote_port")
    # Several options in one value: split at blanks, on purpose.
    # shellcheck disable=SC2206
    [ -z "$remote_ssh_options" ] || ssh_command+=($remote_ssh_options)
    remote=${remote_user:+$remote_user@}$remote_host
    quoted_path=$(printf %q "$remote_path")
}

# Sets `remote_place` to the real path of the folder there, with --delete as $1 if what is strange would be removed. The
# other machine is asked, since only there `./.`, `//` and links are known for what they are. With --make as $2 it is
# made. Ends with a mistake for what holds more than this tree; 1 if the machine or the folder is not to be had.
resolve_remote_place() {
    local code=0
    # No single quotes in it: it travels between two of them, for the login shell there may be any.
    # shellcheck disable=SC2016
    local script='CDPATH=; [ "$3" != --make ] || mkdir -p -- "$1" || exit 1; cd -P -- "$1" || exit 1; place=$(pwd -P);
        cd || exit 1; case "$(pwd -P)/" in "${place%/}/"*) exit 3 ;; esac;
        [ "$2" != --delete ] || [ -f "$place/scripts/remote_options.sh" ] || [ -z "$(ls -A -- "$place")" ] || exit 4;
        printf "%s\n" "$place"'
    remote_place=$("${ssh_command[@]}" "$remote" "sh -c '$script' sh $quoted_path '$1' '$2'") || code=$?
    case $code in
        0) ;;
        3) mistake "--path '$remote_path' is the home on $remote, or holds it: name a folder for this tree alone." ;;
        4) mistake "--delete would remove what lies in '$remote_path' on $remote, which is no copy of this tree." ;;
        *) return 1 ;;
    esac
}
