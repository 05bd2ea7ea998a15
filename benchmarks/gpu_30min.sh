#!/usr/bin/env bash
# The 30-minute recipes for one GPU, from token rows to a table: A1 a masked LM of 85 M matrix parameters, A2
# replaced-token detection at 38 M; then GLUE's small tasks, and BLiMP for A1. Every call goes on where the last stood.
#   bash benchmarks/gpu_30min.sh                          all of it: rows, 2 x 30 minutes, evaluation
#   ARMS= bash benchmarks/gpu_30min.sh                    the token rows alone, for instance on another machine
#   SHARDS=rows PIECE=540 bash benchmarks/gpu_30min.sh    nine minutes of it, from rows made before; call it again
#   SCALE=100 bash benchmarks/gpu_30min.sh                a rehearsal: 1/100 of the time, tiny models, also on a CPU
# Environment: WORK (default runs/gpu-30min); SHARDS, a folder with corpus, tokenizer and shards (default $WORK/rows; of
# the corpus its stage.json is enough); TEXT, a YAML list of sources (default: Wikipedia of ../shared/data); DATA, the
# tasks' files; ARMS; TASKS, words; SCALE; PIECE, seconds after which a call ends (checkpoint, status 75); PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -x .venv/bin/python ] || PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3} SCALE=${SCALE:-1} PIECE=${PIECE:-0}
WORK=${WORK:-runs/gpu-30min}
SHARDS=${SHARDS:-$WORK/rows} ARMS=${ARMS-mlm_85m rtd_38m}
mkdir -p "$WORK"
WORK=$(realpath "$WORK")
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

over() {
  echo "the piece is over after $SECONDS s; everything is kept, call the same command again"
  exit 75
}

frugalbert() {  # one call, ended with a checkpoint when the piece is over
  local left=0 code=0
  if ((PIECE)); then
    left=$((PIECE - SECONDS))
    ((left > 0)) || over
  fi
  timeout --foreground --signal=TERM "$left" "$PYTHON" -m frugalbert.cli "$@" || code=$?
  ((code != 124)) || over
  ((code == 0)) || exit "$code"
}

# ---- what a rehearsal has instead: of everything a little, so that all of it runs

rows=() small=() sizes_mlm_85m=() sizes_rtd_38m=()
((SCALE == 1)) || TEXT=${TEXT:-"[{path: ../../shared/data/enwiki2015-AA.txt.xz, max_documents: 300}]"}
[ -z "${TEXT:-}" ] || rows+=("corpus.sources=$TEXT")
if ((SCALE > 1)); then
  rows+=("tokenizer.vocab_size=2048" "corpus.held_out=0.02")
  small=("pretrain.budget=$(awk "BEGIN {print 1800 / $SCALE}")s" pretrain.validation.rows=64
         "pretrain.checkpoints.every=$(awk "BEGIN {print 180 / $SCALE}")s" machine.compile=false
         finetune.max_train_examples=64 finetune.epochs=1.0 finetune.seeds=[0])
  sizes_mlm_85m=("pretrain.arch=modern 2x64 heads=2 ffn=128 qk_norm=yes" pretrain.batch_size=32
                 pretrain.batch_ramp.start=8 finetune.blimp_pairs=2)
  sizes_rtd_38m=("pretrain.arch=modern 2x64 heads=2 ffn=128" pretrain.batch_size=16 pretrain.batch_ramp.start=8)
fi
[ -z "${DATA:-}" ] || small+=("finetune.data=$(realpath "$DATA")")
if [ -n "${TASKS:-}" ]; then # BLiMP needs a head that predicts words
  sizes_mlm_85m+=("finetune.tasks=[${TASKS// /, }, blimp]") sizes_rtd_38m+=("finetune.tasks=[${TASKS// /, }]")
fi

# ---- token rows: outside the clock

if [ ! -f "$SHARDS/shards/stage.json" ]; then
  for stage in corpus tokenizer shards; do
    frugalbert run benchmarks/gpu_mlm_85m.yaml --dir "$SHARDS" --only $stage "${rows[@]}"
  done
fi
SHARDS=$(realpath "$SHARDS")

# ---- pre-training and evaluation

for arm in $ARMS; do
  out=$WORK/$arm
  if [ ! -d "$out/shards" ]; then # links to the rows; a record that changes becomes a file of its own
    mkdir -p "$out"
    cp -rs "$SHARDS/corpus" "$SHARDS/tokenizer" "$SHARDS/shards" "$out"
  fi
  declare -n sizes=sizes_$arm
  frugalbert run "benchmarks/gpu_$arm.yaml" --dir "$out" --keep corpus --keep tokenizer --keep shards \
    "${rows[@]}" "${small[@]}" "${sizes[@]}"
done

# ---- the table

"$PYTHON" - "$WORK" $ARMS <<'TABLE'
import json
import sys
from pathlib import Path

work, *arms = sys.argv[1:]
rows, names = {}, []
for arm in arms:
    summary = json.loads((Path(work) / arm / "pretrain" / "summary.json").read_text())
    board = json.loads((Path(work) / arm / "finetune" / "board.json").read_text())
    row = {"minutes": summary["seconds"] / 60, "tokens, M": summary["tokens"] / 1e6, "steps": summary["steps"]}
    row |= {"k tokens/s": summary["tokens_per_second"] / 1e3, "loss": summary["final_validation_loss"]}
    row |= {found["task"]: found["mean"] for found in board["rows"]}
    row |= {"blimp": board["blimp"]["pretrained"]["accuracy"]} if board.get("blimp") else {}
    rows[arm] = row
    names += [name for name in row if name not in names]
print(f"| arm | {' | '.join(names)} |" + "\n|---" + "|---" * len(names) + "|")
for arm, row in rows.items():
    print(f"| {arm} | " + " | ".join(f"{row[name]:.4g}" if name in row else "" for name in names) + " |")
TABLE
