# shellcheck shell=bash
# Sourced by the scripts beside it. Sets REPO (this checkout) and PYTHON (an interpreter that has everything), in this order:
#   1. the active environment, if the package and its dependencies can be imported there;
#   2. the checkout's own .venv, if it was set up from the present pyproject.toml and constraints.txt;
#   3. a new .venv, made once, with the versions that constraints.txt pins.
# NEED_MODULES may name further modules that the caller runs (the linters, for instance).

REPO="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Looks modules up without importing them, and from another folder, so that the checkout alone does not count as installed.
_env_complete() {
    (cd / && "$1" -c '
import sys
from importlib.util import find_spec
repo, *names = sys.argv[1:]
if sys.prefix == repo + "/.venv":
    sys.exit(1)  # its stamp decides, below
try:
    missing = [name for name in names if find_spec(name) is None]
except (ImportError, ValueError):
    sys.exit(1)
if missing:
    sys.exit(1)
origin = find_spec("dcr_mllm").origin or ""
if not origin.startswith(repo + "/"):
    print(f"note: using dcr_mllm as installed in {sys.prefix}, not this checkout", file=sys.stderr)
' "$REPO" dcr_mllm stage1_dcr stage2_llava torch torchvision transformers diffusers deepspeed peft datasets pydantic yaml \
        ${NEED_MODULES:-}) 2>&1
}

_env_stamp() {
    printf '%s %s\n' "$REPO" "$(cat "$REPO/pyproject.toml" "$REPO/constraints.txt" | cksum)"
}

_env_ready() {
    [ -x "$REPO/.venv/bin/python" ] && [ -f "$REPO/.venv/dcr-mllm-stamp" ] &&
        [ "$(cat "$REPO/.venv/dcr-mllm-stamp")" = "$(_env_stamp)" ]
}

# The pinned releases need Python 3.11.
_env_base_python() {
    local candidate
    for candidate in python3.11 python3 python python3.12 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.11 or newer found; install one (with its venv module) and run this again" >&2
    return 1
}

_env_create() {
    # Another terminal may have finished the set-up while this one waited for the lock.
    if _env_ready; then return 0; fi
    local base python="$REPO/.venv/bin/python"
    rm -f "$REPO/.venv/dcr-mllm-stamp"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="$(_env_base_python)" || return 1
        echo "Making $REPO/.venv with $base." >&2
        "$base" -m venv --clear "$REPO/.venv" >&2 || {
            echo "error: $base cannot make environments; install its venv module (Debian, Ubuntu: python3-venv)" >&2
            return 1
        }
    fi
    echo "Installing the pinned packages into $REPO/.venv, once; this takes several minutes." >&2
    # torch first: packages built from source look for it. The stamp last: an interrupted set-up starts again.
    "$python" -m pip install --quiet --disable-pip-version-check -c "$REPO/constraints.txt" torch torchvision >&2 &&
        "$python" -m pip install --quiet --disable-pip-version-check -c "$REPO/constraints.txt" -e "$REPO[dev]" >&2 || {
        echo "error: the installation failed, see above; run this again to go on where it stopped" >&2
        return 1
    }
    _env_stamp >"$REPO/.venv/dcr-mllm-stamp.partial"
    mv "$REPO/.venv/dcr-mllm-stamp.partial" "$REPO/.venv/dcr-mllm-stamp"
}

_env_find() {
    local candidate note
    PYTHON=""
    for candidate in python python3; do
        if command -v "$candidate" >/dev/null 2>&1 && note="$(_env_complete "$candidate")"; then
            PYTHON="$(command -v "$candidate")"
            if [ -n "$note" ]; then echo "$note" >&2; fi
            return 0
        fi
    done
    if ! _env_ready; then
        if command -v flock >/dev/null 2>&1; then
            (flock 9 && _env_create) 9>"$REPO/.venv.lock" || return 1
        else
            _env_create || return 1
        fi
    fi
    PYTHON="$REPO/.venv/bin/python"
}

_env_find || exit 1
export REPO PYTHON
