#!/usr/bin/env bash
# Few long windows, token norms clipped: dense, stbllm and pbs2p at 4:8 and 6:8 on one model.
#
#   benchmarks/headline.sh MODEL WORK RESULTS      (WikiText-2 in SUBBIT_DATA, or the hub)
set -euo pipefail
model=$1 work=$2 results=$3
mkdir -p "$work" "$results"

subbit eval "$model" --perplexity wikitext2 --max-windows 20 --json > "$results/dense-eval.json"
for method in stbllm pbs2p; do
  for sparsity in 4:8 6:8; do
    name=$method-${sparsity/:/-}
    /usr/bin/env time -v -o "$results/$name-time.txt" \
      subbit compress "$model" -o "$work/$name" --method "$method" --sparsity "$sparsity" \
      --calibration wikitext2 --samples 32 --seq-len 2048 --set calibration.clip_norm=2 --resume --json > "$results/$name-inspect.json"
    subbit eval "$work/$name" --perplexity wikitext2 --max-windows 20 --json > "$results/$name-eval.json"
  done
done
