# shellcheck shell=bash
# Sourced by the other scripts: creates .venv in the clone and installs the given requirements, once.
# Usage: prepare_environment NAME ARGUMENTS-OF-PIP-INSTALL...

PYTHON=${PYTHON:-python3}
VENV=.venv

# Huge pages for large arrays, and freed memory kept between steps: faster on CPUs with glibc.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368:glibc.malloc.trim_threshold=34359738368}

fail() {
  echo "error: $*" >&2
  exit 1
}

prepare_environment() {
  local name=$1 stamp
  shift
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11; name a newer one: PYTHON=python3.12 $0"
  # The stamp file names the installed requirements, so that a second run installs nothing.
  stamp=$VENV/.installed-$name-$(cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
  [ -e "$stamp" ] && return
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "cannot make $VENV; on Debian and Ubuntu: apt install python3-venv"
  echo "installing into $VENV (some minutes, once)"
  # Modules are compiled when they are first imported, which most of them never are.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@" || fail "installing failed; fix what pip reports above and run this again"
  touch "$stamp"
}
