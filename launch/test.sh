#!/usr/bin/env bash
# Installs what the tests need and runs them on the CPU.
# Usage: bash launch/test.sh [--reference [--remake]] [ARGUMENTS OF PYTEST]
#   --reference   only the comparisons with PyTorch, PEFT and the TPU compiler, which are installed for it and run anew
#   --remake      with --reference: writes the arrays that the other tests compare with (tests/references) anew
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

extra='test'
for argument; do
  case $argument in
    --reference) extra=reference ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
  esac
done
prepare_environment "$extra" --editable ".[$extra]"
PYTHON=$PWD/$VENV/bin/python bash launch/fetch_student.sh weights
export JAX_PLATFORMS=cpu
# A process for each core, up to four. The tests of a file run in one process, in the order that tests/conftest.py says.
exec "$VENV/bin/python" -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadgroup --no-loadscope-reorder "$@"
