#!/bin/sh
# Starts the bridge, or its tests, from any directory.
#
#   ./run.sh [WORD] [OPTION...]   as python3 qoo_bridge.py, and LiteLLM beside it if it is installed
#   ./run.sh test [OPTION...]     the tests, with pytest's options; pytest goes into .venv if need be
#
#   PYTHON           the interpreter; without it the first on PATH that is Python 3.9 or newer
#   NO_LITELLM       set to anything, LiteLLM is left alone
#   QOO_TEST_VENVS   the folder of the tests' environments, one for each Python version (.venv)
set -eu

say() {
    printf 'run.sh: %s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

# Print the folder of this file, whatever links lead to it. macOS had no `readlink -f` for long.
own_folder() {
    file=$0
    while [ -L "$file" ]; do
        target=$(readlink "$file")
        case $target in
            /*) file=$target ;;
            *) file=$(dirname "$file")/$target ;;
        esac
    done
    CDPATH='' cd -- "$(dirname "$file")" && pwd -P
}

# Print the name of a Python that will do. A name can be there and still not run (a pyenv shim).
find_python() {
    if [ -n "${PYTHON-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python python3.14 python3.13 python3.12 python3.11 python3.10 python3.9
    fi
    for name; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    found=$("$1" -V 2>&1) || found="no $1"
    fail "needs Python 3.9 or newer and found $found. On Debian or Ubuntu: apt install python3"
}

# Import the file, because Python keeps the bytecode of modules (in __pycache__ beside them), not of scripts:
# the second start takes half the time. -c puts the current folder on Python's path. Nothing may be imported
# from there, so this file's folder takes its place.
START='import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
import qoo_bridge
sys.exit(qoo_bridge.main())'

# == tests ====================================================================

# Print the interpreter of an environment that has pytest; the one of a Python version is made once.
test_python() {
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    venv=${QOO_TEST_VENVS:-$here/.venv}/$version
    if ! "$venv/bin/python" -c 'import pytest' 2>/dev/null; then
        say "making $venv with pytest"
        # Debian's Python has venv, but not the ensurepip that it needs.
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "needs Python's venv and ensurepip. On Debian or Ubuntu: apt install python3-venv (or python$version-venv)"
        "$python" -m venv --clear "$venv" >&2 || fail "could not make $venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check pytest >&2 ||
            fail "could not install pytest into $venv: is the package index reachable?"
    fi
    printf '%s\n' "$venv/bin/python"
}

# -c, --rootdir, --confcutdir: as a submodule, the tests must not take over the settings and the conftest.py of
# the project around them.
run_tests() {
    pytest_python=$(test_python)
    cd "$here"
    export PYTHONDONTWRITEBYTECODE=1
    exec "$pytest_python" -W error -m pytest -c /dev/null --rootdir="$here" --confcutdir="$here" \
        -p no:cacheprovider "$@"
}

# == LiteLLM ==================================================================
# Where a `litellm` command is installed, it serves on port 4000 beside the bridge, with litellm.yaml.

GENERATED='# Written by run.sh at each start. Without this line the file is yours and stays as it is.'

# Tell by the arguments whether the bridge is about to serve.
will_serve() {
    case ${1-serve} in
        serve | -*) ;;
        *) return 1 ;;
    esac
    for argument; do
        case $argument in
            -h | --help | --version) return 1 ;;
        esac
    done
}

find_litellm() {
    for name in litellm "$here"/.venv/bin/litellm "$here"/.venv/*/bin/litellm; do
        command -v "$name" && return
    done
    return 1
}

# Write litellm.yaml unless it is the user's. The models are known once the bridge answers: asked until then.
# Only the owner may read the file, because it can hold keys.
write_litellm_yaml() {
    if [ -f "$yaml" ] && [ "$(head -n 1 "$yaml")" != "$GENERATED" ]; then
        return
    fi
    [ "${1-}" != serve ] || shift
    umask 077
    tries=30
    until models=$("$python" -c "$START" "$here" litellm-config "$@" 2>"$log"); do
        tries=$((tries - 1))
        if [ "$tries" -eq 0 ]; then
            say "no LiteLLM: $(tail -n 1 "$log")"
            return 1
        fi
        sleep 1
        kill -0 $$ 2>/dev/null || return 1
    done
    printf '%s\n' "$GENERATED" "$models" >"$yaml.new"
    mv "$yaml.new" "$yaml"
}

# Print the address that the options or the environment have the bridge listen on: LiteLLM goes no further.
own_host() {
    host=${QOO_BRIDGE_HOST:-0.0.0.0}
    while [ $# -gt 0 ]; do
        case $1 in
            --host) host=${2-} ;;
            --host=*) host=${1#--host=} ;;
        esac
        shift
    done
    printf '%s\n' "$host"
}

# Tell whether a port is taken, on an address or on this host: LiteLLM asks localhost, and then takes a random
# port on all addresses.
port_is_taken() {
    "$python" -c 'import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family) as listener, socket.socket() as client:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        sys.exit(0)
    sys.exit(client.connect_ex(("localhost", port)) != 0)' "$1" "$2"
}

# Run LiteLLM for as long as the bridge runs. The bridge has this shell's process id ($$), see the last line:
# so signals and the exit status are its own, and LiteLLM ends however the bridge does.
serve_litellm() {
    litellm=$1
    shift
    yaml=$here/litellm.yaml
    log=$here/litellm.log
    write_litellm_yaml "$@" || return 0
    kill -0 $$ 2>/dev/null || return 0  # the bridge has ended: another one may have told the models
    host=$(own_host "$@")
    if port_is_taken "$host" 4000; then
        say "no LiteLLM: another program uses port 4000. Stop it and start again, or set NO_LITELLM=1"
        return 0
    fi
    # Without the variable, each start waits for a price list from GitHub.
    LITELLM_LOCAL_MODEL_COST_MAP=${LITELLM_LOCAL_MODEL_COST_MAP:-True} \
        "$litellm" --host "$host" --port 4000 --config "$yaml" >"$log" 2>&1 &
    door='asks for its master key'
    if grep -q '^ *dangerously_permit_weak_or_unset_master_key: *true' "$yaml"; then
        door='open to everyone who can reach it'
    fi
    say "LiteLLM starts on http://$host:4000, $door; it logs to $log"
    while kill -0 $$ 2>/dev/null; do
        if ! kill -0 $! 2>/dev/null; then
            say "LiteLLM ended, and the bridge goes on: see $log"
            return
        fi
        sleep 1
    done
    kill $! 2>/dev/null || :  # ended meanwhile
}

# =============================================================================

here=$(own_folder)
python=$(find_python)
if [ "${1-}" = test ]; then
    shift
    run_tests "$@"
fi
if [ -z "${NO_LITELLM-}" ] && will_serve "$@" && litellm=$(find_litellm); then
    serve_litellm "$litellm" "$@" &
fi
exec "$python" -c "$START" "$here" "$@"
