#!/usr/bin/env bash
# Makes the virtual environment: .venv, or $MINPRO_VENV. Every make target runs it; it returns at once when nothing
# it depends on has changed.
#
#   environment/setup.sh            set up
#   environment/setup.sh --python   only print the Python interpreter that would be used
#
# MINPRO_PYTHON names the interpreter (3.12 or 3.13); otherwise a working one is searched for.
# With an NVIDIA driver the full train and serve extras go in, without one the CPU environment.
#
# Several checkouts may use one environment (MINPRO_VENV): make, minpro, python -m minpro_megatron and the files of
# tools/ run the code of the checkout in which they are called. Elsewhere minpro runs that of the checkout that made the
# environment.
set -euo pipefail
unset PYTHONPATH # what is installed must not be confused with what lies in a checkout

# Only bash builtins up to the search for Python: what is on PATH is not known to work yet.
SCRIPT_DIR=${BASH_SOURCE[0]%/*}
[ "$SCRIPT_DIR" != "${BASH_SOURCE[0]}" ] || SCRIPT_DIR=.
ROOT=$(cd "$SCRIPT_DIR/.." && pwd)
cd "$ROOT"

VENV=${MINPRO_VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV
PY=$VENV/bin/python
STATE=$VENV/minpro_setup
STAMP=$STATE.stamp           # hash of everything the set-up depends on
INSTALLED=$STATE.installed   # the distributions it left
UNFINISHED=$STATE.unfinished # exists while a set-up runs, so an interrupted one leaves it behind
LOG=$STATE.log

fail() {
    echo "setup: $*" >&2
    exit 1
}

# --- the interpreter ---

# A version manager's shim is on PATH whether or not the version it names is selected, and system Pythons may come
# without venv or ssl, so a candidate counts only when it has run.
python_works() {
    "$1" -c 'import ensurepip, ssl, sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1 </dev/null
}

find_python() {
    local candidate
    if [ -n "${MINPRO_PYTHON:-}" ]; then
        python_works "$MINPRO_PYTHON" ||
            fail "MINPRO_PYTHON=$MINPRO_PYTHON is not a working Python 3.12 or 3.13 (with venv and ssl):" \
                "correct or unset it"
        echo "$MINPRO_PYTHON"
        return
    fi
    for candidate in python3.12 python3.13 python3 "${HOME:-/root}"/.pyenv/versions/3.1[2-9]*/bin/python; do
        if python_works "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    # Last, because uv looks through PATH itself and stops at a broken shim.
    candidate=$(uv python find --no-project '>=3.12,<3.14' 2>/dev/null </dev/null) || candidate=
    if [ -n "$candidate" ] && python_works "$candidate"; then
        echo "$candidate"
        return
    fi
    fail "no working Python 3.12 or 3.13 (with venv and ssl) found: install one, for example with" \
        "'uv python install 3.12', or set MINPRO_PYTHON to its path"
}

# --- what is there already ---

# "gpu" where there is an NVIDIA driver, else "cpu". $1 is any Python that runs.
machine_kind() {
    if "$1" environment/sglang_cpu/src/minpro_sglang_cpu/cuda_driver.py >/dev/null ||
        nvidia-smi -L >/dev/null 2>&1; then
        echo gpu
    else
        echo cpu
    fi
}

hash_inputs() {
    "$PY" - "$1" pyproject.toml environment/*.txt environment/setup.sh environment/owner.py environment/sglang_cpu/*.* \
        environment/sglang_cpu/src/*/*.py <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(f"{sys.argv[1]} {sys.version}".encode())
for name in sys.argv[2:]:
    digest.update(name.encode() + b"\0" + pathlib.Path(name).read_bytes() + b"\0")
print(digest.hexdigest())
PYTHON
}

# Without an argument: prints the installed distributions. With the file of an earlier such list: exits 0 if they
# are all still there in the same versions (more may have been added).
installed() {
    "$PY" - "$@" <<'PYTHON'
import importlib.metadata, pathlib, sys
found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
if sys.argv[1:]:
    sys.exit(not set(pathlib.Path(sys.argv[1]).read_text().split()) <= found)
print(*sorted(found), sep="\n")
PYTHON
}

is_up_to_date() {
    [ -f "$STAMP" ] && [ -f "$INSTALLED" ] && ! must_rebuild &&
        [ "$(<"$STAMP")" = "$(hash_inputs "$(<"$STATE.kind")")" ] && installed "$INSTALLED" &&
        "$PY" environment/owner.py >/dev/null
}

# An interrupted or broken environment, or one of another kind or Python, is built again; pip updates any other.
must_rebuild() {
    if [ -e "$UNFINISHED" ] || ! "$PY" -c '' 2>/dev/null || ! has_pip; then
        return 0
    fi
    if [ -n "${MINPRO_PYTHON:-}" ] && [ "$("$PY" -V)" != "$("$MINPRO_PYTHON" -V 2>&1)" ]; then
        return 0
    fi
    [ -f "$STATE.kind" ] && [ "$(<"$STATE.kind")" != "$(machine_kind "$PY")" ]
}

# Importing it would take longer than all the other checks.
has_pip() {
    compgen -G "$VENV/lib/python3.*/site-packages/pip/__main__.py" >/dev/null
}

# --- stages ---

NUM_STAGES=5
stage_number=0

# Runs a command as the next stage and prints one line for it; what the command printed is shown only if it failed.
stage() {
    local title=$1 started=$SECONDS status
    shift
    stage_number=$((stage_number + 1))
    printf '[%d/%d] %s ... ' "$stage_number" "$NUM_STAGES" "$title"
    # Not `if ! "$@"`: inside a condition bash ignores errors in all but a function's last command.
    set +e
    (
        set -e
        "$@"
    ) >"$LOG" 2>&1 </dev/null
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        printf 'failed after %d s\n' $((SECONDS - started))
        tail -n 30 "$LOG" >&2
        fail "stage $stage_number failed (all its output: $LOG): repair the cause and run make setup again"
    fi
    printf '%d s\n' $((SECONDS - started))
}

# -qq shows errors and no warnings. Without the cache, which would hold every download a second time. Without
# compiling: check_imports compiles the third of the files that is ever imported.
pip_install() {
    "$PY" -m pip install -qq --no-input --disable-pip-version-check --root-user-action ignore \
        --no-cache-dir --no-compile "$@"
}

pinned() {
    pip_install "${CONSTRAINTS[@]}" "$@"
}

version_of() {
    sed -n "s/^$1==//p" environment/constraints.txt
}

# Empties $VENV, provided it is ours to empty. The mark stays throughout, so that this too can be interrupted.
empty_venv() {
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ ! -e "$UNFINISHED" ] && [ -n "$(ls -A "$VENV")" ]; then
        fail "$VENV exists and is not a virtual environment: move it away or set MINPRO_VENV to another path"
    fi
    mkdir -p "$VENV"
    : >"$UNFINISHED"
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${UNFINISHED##*/}" -exec rm -rf {} +
}

# $1 is the Python to make the virtual environment with; empty where there is one already.
install_pip() {
    [ -z "$1" ] || "$1" -m venv "$VENV"
    # The build tools too: the local packages are built with these, not with ones fetched for each build.
    pinned pip setuptools wheel packaging
}

# The requirements of the project and of the named extras, without the project itself.
install_requirements() {
    "$PY" - "$@" >"$STATE.requirements" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *(r for e in sys.argv[1:] for r in project["optional-dependencies"][e]), sep="\n")
PYTHON
    # The isolated build environment of Transformer Engine's torch extension would fetch a second torch.
    pinned --no-build-isolation -r "$STATE.requirements"
}

# Not over the installation of another checkout that is still there.
install_project() {
    local owner
    owner=$("$PY" environment/owner.py) || owner=$ROOT
    [ "$owner" -ef "$ROOT" ] || return 0
    pip_install --no-deps --no-build-isolation --editable .
}

install_sglang_cpu_and_project() {
    pinned --no-deps sglang
    # From a copy, because building leaves files beside the sources.
    local copy
    copy=$(mktemp -d)
    cp -R environment/sglang_cpu/. "$copy"
    pip_install --no-deps --no-build-isolation --force-reinstall "$copy"
    rm -rf "$copy"
    install_project
}

# What ranks and servers import when they start. Written as bytecode now, so that the first start of three processes
# at once does not spend half a minute on it.
check_imports() {
    env -u PYTHONDONTWRITEBYTECODE "$PY" - <<'PYTHON'
import matplotlib.pyplot, megatron.core.models.gpt, minpro_megatron, nemo_run, sgl_kernel, tensorboard
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.registry
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
PYTHON
}

set_up() {
    local kind python="" started=$SECONDS
    if must_rebuild; then
        python=$(find_python)
        kind=$(machine_kind "$python")
        echo "setup: creating the $kind environment in $VENV with $("$python" -V) ($python)"
        empty_venv
    else
        kind=$(machine_kind "$PY")
        echo "setup: updating the $kind environment in $VENV"
    fi
    : >"$UNFINISHED"
    rm -f "$STAMP"
    echo "$kind" >"$STATE.kind"

    CONSTRAINTS=(-c environment/constraints.txt)
    [ "$kind" = cpu ] || CONSTRAINTS+=(-c environment/constraints_gpu.txt)
    stage "virtual environment, pip, build tools" install_pip "$python"
    stage "torch $(version_of torch), the largest download" pinned torch
    if [ "$kind" = gpu ]; then
        stage "Megatron-Core, Transformer Engine, SGLang and its kernels" install_requirements train serve cluster dev
        stage "minpro-megatron itself" install_project
    else
        stage "Megatron-Core and the other requirements" install_requirements cpu cluster dev
        stage "SGLang $(version_of sglang), its CPU plugin, minpro-megatron itself" install_sglang_cpu_and_project
    fi
    stage "check that everything imports" check_imports

    installed >"$INSTALLED"
    hash_inputs "$kind" >"$STAMP"
    rm -f "$UNFINISHED"
    echo "setup: done in $((SECONDS - started)) s"
}

main() {
    if [ "${1:-}" = --python ]; then
        find_python
        return
    fi
    [ $# -eq 0 ] || fail "unknown argument '$1': only --python is known"
    ! is_up_to_date || return 0
    # Before anything is written: without a Python there is nothing to lock.
    ! must_rebuild || find_python >/dev/null
    # Two makes at once would install into the same folder; the second finds the work done.
    if command -v flock >/dev/null; then
        mkdir -p "${VENV%/*}"
        exec 9>"$VENV.lock"
        flock 9
        ! is_up_to_date || return 0
    fi
    set_up
}

main "$@"
