#!/usr/bin/env bash
# The main job on a CPU, end to end: environment, student, zero-shot, LoRA training, evaluation, table.
# Usage: bash launch/quickstart.sh [--data DIR [--splits FILE]] [--out DIR] [--config.key=value ...]
#   --data DIR      a ScienceQA directory (problems.json, pid_splits.json, captions.json) instead of the sample
#   --splits FILE   the file in DIR that assigns questions to splits
#   --out DIR       where the runs go (default: runs/quickstart)
# Safe to run again: finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

data='' splits=pid_splits.json out=runs/quickstart overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=${2:?--data needs a directory}; shift 2 ;;
    --splits) splits=${2:?--splits needs a file name}; shift 2 ;;
    --out) out=${2:?--out needs a directory}; shift 2 ;;
    --config.*) overrides+=("$1"); shift ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1; see bash launch/quickstart.sh --help" ;;
  esac
done
problems=sample
if [ -n "$data" ]; then
  [ -d "$data" ] || fail "--data $data: no such directory"
  problems=$data
  overrides=(--config.data.source=dir "--config.data.path=$data" "--config.data.splits=$splits" --config.recipe.max_target=128 --config.train.row_length=512 --config.eval.row_length=512 "${overrides[@]}")
fi

prepare_environment run --requirement requirements.txt
python=$PWD/$VENV/bin/python
PYTHON=$python bash launch/fetch_student.sh weights
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TOKENIZERS_PARALLELISM=true

step() { echo && echo "== $*"; }
config=(--config configs/quickstart.py "${overrides[@]}")
split=test limit=$("$python" -c 'from configs.quickstart import get_config; print(get_config().eval.limit)')
for override in "${overrides[@]}"; do
  case $override in
    --config.eval.limit=*) limit=${override#*=} ;;
    --config.eval.split=*) split=${override#*=} ;;
  esac
done

step "the training set"
"$python" -m sqa_jax.preprocess "${config[@]}"
step "before training: the student zero-shot"
"$python" -m sqa_jax.evaluate "${config[@]}" --workdir "$out/zero-shot" --config.eval.checkpoint=none
step "training"
"$python" -m sqa_jax.train "${config[@]}" --workdir "$out/trained"
step "after training"
"$python" -m sqa_jax.evaluate "${config[@]}" --workdir "$out/trained"
step "a bag-of-words baseline"
"$python" -m sqa_jax.metrics.bag_of_words --problems "$problems" --splits "$splits" --split "$split" --limit "$limit" --out "$out/bag_of_words.jsonl"
step "accuracy in percent on the first $limit questions of the $split split"
"$python" -m sqa_jax.score --problems "$problems" --splits "$splits" --split "$split" --limit "$limit" --format table \
  --predictions "zero-shot=$out/zero-shot/eval/$split/predictions.jsonl" \
  --predictions "bag of words=$out/bag_of_words.jsonl" \
  --predictions "trained=$out/trained/eval/$split/predictions.jsonl" | tee "$out/table.txt"
cat <<END

Where everything is:
  this table              $out/table.txt
  the adapter             $out/trained/checkpoints/best
  how training went       $out/trained/metrics.jsonl and tensorboard/
  every answer            $out/trained/eval/$split/predictions.jsonl
  the training set        datasets/
END
