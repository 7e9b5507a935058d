#!/usr/bin/env bash
# From text to generated text, by way of a kill: a minute on a laptop, four processes, no GPU.
#   docs/tour.sh [FOLDER]       default: a new folder under /tmp, named at the end
set -euo pipefail

text=$(cd "$(dirname "$0")/.." && pwd)/recipes/data/shakespeare.txt
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"

step() { printf '\n== %s\n' "$*"; }

step "a recipe: a small Llama on two tensor-parallel by two pipeline ranks"
cat >tour.yaml <<'YAML'
name: tour
model: {hidden_size: 64, num_layers: 4, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 192, vocab_size: 512}
topology: {tp: 2, pp: 2, dp: 1}
training: {seq_len: 64, micro_batch_size: 4, global_batch_size: 8, steps: 60, precision: fp32}
optimizer: {lr: 4.0e-3}
data: {train: data/shakespeare}
checkpoint: {every: 10}
logging: {every: 10, wandb: {mode: offline}}
YAML

step "text to tokens"
tplaunch data prepare "$text" --output data/shakespeare --vocab-size 512

step "what each rank would hold on an H100"
tplaunch plan tour.yaml --gpu h100-80gb

step "train, and kill it outright after its first checkpoint"
tplaunch train tour.yaml &
launch=$!
until grep -qs '"event": "checkpoint"' runs/tour/events.jsonl; do
    kill -0 "$launch" # ends the tour, should training have ended before
    sleep 0.2
done
kill -KILL "$launch"
wait "$launch" || echo "killed: exit code $?"

step "the same command goes on from the newest complete checkpoint"
tplaunch train tour.yaml
tplaunch runs show tour

step "a Hugging Face folder of it"
tplaunch export runs/tour hf/tour

step "text, on two ranks"
tplaunch generate runs/tour --prompt "ROMEO:" --max-tokens 48 --temperature 0.8 --tp 2

step "all of it is in $PWD"
