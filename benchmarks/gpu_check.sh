#!/usr/bin/env bash
# What to run when a GPU is at hand for some minutes, in order of value. Each piece has its own
# limit and writes to $OUT at once. benchmarks/gpu_notes.md says what was found so far.
#
#   Here, once (fills .gpu, which git does not see, with CIFAR-10, wheels and the unpacking script):
#     bash benchmarks/gpu_check.sh prepare SHARED      # SHARED/data/cifar10, SHARED/tools/unpack.py
#   On the GPU machine, with the repository and the folder .gpu:
#     BUDGET=330 bash benchmarks/gpu_check.sh env together bench_cifar bench_r50 views
#     BUDGET=570 bash benchmarks/gpu_check.sh train
#   Dry, on a CPU (a test runs it):
#     DEVICE=cpu TINY=--tiny HOW=off OUT=out bash benchmarks/gpu_check.sh micro resume bench_cifar train
set -u
export TMPDIR=${TMPDIR:-/var/tmp}
HERE=$(cd "$(dirname "$0")" && pwd)
CARRIED=${CARRIED:-$PWD/.gpu}
BEGAN=${CHECK_BEGAN:-$(date +%s)}
BUDGET=${BUDGET:-575}            # seconds in all; the call ends at 600
DEVICE=${DEVICE:-cuda}; TINY=${TINY:-}
OUT=${OUT:-${TMPDIR:-/var/tmp}/gpu_out}; mkdir -p "$OUT"; export OUT
PY=${PY:-python3}
SITE=${SITE:-${TMPDIR:-/var/tmp}/site}
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/var/tmp}/inductor} MOCOKIT_CACHE=${TMPDIR:-/var/tmp}/mocokit_cache
LOG="$OUT/log.txt"

left() { echo $((BUDGET - ($(date +%s) - BEGAN))); }
say() { echo "[$(( $(date +%s) - BEGAN ))s] $*" | tee -a "$OUT/report.txt"; }
# limited SECONDS NAME COMMAND...: no longer than that, nor than what is left
limited() {
  local most=$1 name=$2; shift 2
  local rest; rest=$(left)
  [ "$rest" -lt 10 ] && { say "SKIP $name: $rest s left"; return 1; }
  [ "$most" -gt $((rest - 5)) ] && most=$((rest - 5))
  local start=$SECONDS
  timeout -k 5 "$most" "$@" >>"$LOG" 2>&1
  local code=$?
  [ $code -eq 124 ] || [ $code -eq 137 ] && say "TIME $name: stopped after $most s" || say "done $name: exit $code, $((SECONDS - start)) s"
  return $code
}

setup() {  # what the device's image lacks: pydantic and what it needs
  [ -d "$SITE/pydantic" ] || ! ls "$CARRIED"/whl/*.whl >/dev/null 2>&1 && return
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$CARRIED"/whl/*.whl >>"$LOG" 2>&1
}

piece_env() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$OUT/report.txt"
  limited 90 env $PY - <<'P'
import os, shutil, sys, importlib.metadata as m
import torch
out = open(os.path.join(os.environ["OUT"], "report.txt"), "a")
def tell(*a): print(*a, file=out, flush=True)
tell("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version(), "cpus", os.cpu_count())
for name in ("torchvision", "timm", "triton", "numpy", "pillow", "pydantic", "safetensors", "typer", "pytest"):
    try: tell(" ", name, m.version(name))
    except Exception as e: tell("  MISSING", name, e)
tell("  C compiler", shutil.which("cc"), shutil.which("gcc"), shutil.which("clang"))
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0); tell(" ", p.name, p.multi_processor_count, "SM", round(p.total_memory/2**30,1), "GiB", "uuid", getattr(p, "uuid", None))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16); b = torch.empty(2**30, dtype=torch.float32, device="cuda"); c = torch.ones_like(b)
    def t(f, n=10):
        for _ in range(3): f()
        s, e = torch.cuda.Event(True), torch.cuda.Event(True); s.record()
        for _ in range(n): f()
        e.record(); torch.cuda.synchronize(); return s.elapsed_time(e)/n/1e3
    tell("  bf16 product TFLOP/s", round(2*8192**3/t(lambda: a@a)/1e12), " copy TB/s", round(8*2**30/t(lambda: b.copy_(c))/1e12, 2))
import mocokit, mocokit.train, timm
tell("  mocokit", mocokit.__version__, "imports", "default precision", __import__("mocokit.engine.runtime", fromlist=["x"]).default_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
from mocokit.views.fused import can_compile
tell("  can_compile", can_compile())
P
}

piece_tests() {
  limited "${T_TESTS:-110}" tests $PY -m pytest -m gpu -q -n 0 --maxfail 6 --durations=8 -p no:cacheprovider --timeout 100 \
    --continue-on-collection-errors $(grep -l "mark.gpu" tests/test_*.py)
  grep -E "^(FAILED|ERROR|E  )|passed|failed|no tests" "$LOG" | tail -25 >>"$OUT/report.txt"
}

# Tests, and every method against a CPU, at once: nothing of it is timed.
piece_together() {
  piece_tests & local tests=$!
  piece_micro
  wait $tests
}

# All at once: sixteen cores compile while the GPU is shared; nothing here is timed.
piece_micro() {
  local cases=${CASES:-"mocov2 symmetric mocov2plus simclr micro_batch dclw endtoend_pieces bank bank_nce chunk"} pids=()
  export TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1
  for case in $cases; do
    how=both; case $case in dclw|endtoend_pieces|chunk|bank_nce|bank) how=off;; esac
    limited "${T_MICRO:-190}" "micro $case" $PY "$HERE/gpu_check.py" micro "$case" --device $DEVICE $TINY --out "$OUT" --compile "${HOW:-$how}" & pids+=($!)
    [ "$DEVICE" = cpu ] && wait "${pids[-1]}"
  done
  if [ "$DEVICE" = cuda ] && [ -z "${NO_WARM:-}" ]; then
    for name in cifar r50; do
      TORCHINDUCTOR_COMPILE_THREADS=6 limited "${T_WARM:-240}" "warm $name" $PY "$HERE/gpu_check.py" warm $name --out "$OUT" & pids+=($!)
    done
  fi
  if [ -n "${WITH_RESUME:-}" ]; then
    limited 200 resume $PY "$HERE/gpu_check.py" resume --compile "${HOW:-both}" --device $DEVICE $TINY --out "$OUT" & pids+=($!)
  fi
  wait "${pids[@]}"
  unset TORCHINDUCTOR_COMPILE_THREADS OMP_NUM_THREADS
}

piece_resume() { limited "${T_RESUME:-150}" resume $PY "$HERE/gpu_check.py" resume --compile "${HOW:-both}" --device $DEVICE $TINY --out "$OUT"; }
piece_views() { limited "${T_VIEWS:-90}" views_cuda $PY benchmarks/views_cuda.py; grep -E "images/s|views / step|torch 2" "$LOG" | tail -4 >>"$OUT/report.txt"; }
piece_bench_cifar() { limited "${T_BENCH:-80}" bench_cifar $PY "$HERE/gpu_check.py" bench cifar --compile "${HOW:-both}" --device $DEVICE $TINY --out "$OUT"; }
piece_bench_r50() { limited "${T_BENCH:-110}" bench_r50 $PY "$HERE/gpu_check.py" bench r50 --compile "${HOW:-both}" --device $DEVICE $TINY --out "$OUT"; }

# The recipe as it is, 200 epochs, ended by SIGTERM when time is up (it saves, and says so): comparable
# with the authors' log. CUDA graphs are checked beside its first steps; if they compute other losses
# than the CPU, or if the run fails, it starts again without them.
piece_train() {
  local data=${TMPDIR:-/var/tmp}/cifar10.npz run=${TMPDIR:-/var/tmp}/gpu_train
  [ "$(left)" -lt 40 ] && { say "SKIP train: $(left) s left"; return; }
  if [ -n "$TINY" ]; then data=${TMPDIR:-/var/tmp}/gpu_resume/toy.npz; [ -f "$data" ] || $PY "$HERE/gpu_check.py" toy
  elif [ ! -f $data ]; then limited 60 unpack $PY "$CARRIED/shared/tools/unpack.py" cifar10 $data || return; fi
  ( while sleep 5; do cp -f "$run/metrics.jsonl" "$OUT/metrics.jsonl" 2>/dev/null; done ) & local copier=$!
  if [ "$DEVICE" = cuda ]; then
    ( TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1 limited 100 "graphs" $PY "$HERE/gpu_check.py" micro mocov2 --out "$OUT" --compile graphs
      grep -q "FAIL micro mocov2 bfloat16" "$OUT/report.txt" && touch "$OUT/no_graphs" && pkill -TERM -f "mocokit pretrain" ) &
    [ -n "${WITH_TESTS:-}" ] && { piece_tests & }
  fi
  _train "$data" "$run" auto
  if [ -f "$OUT/no_graphs" ] || { [ "$CODE" -ne 0 ] && [ "$CODE" -ne 75 ]; }; then
    [ -f "$OUT/no_graphs" ] && rm -rf "$run"
    _train "$data" "$run" false
  fi
  kill $copier 2>/dev/null; cp -f "$run/metrics.jsonl" "$run/config.yaml" "$OUT/" 2>/dev/null
  # The weights come home in pieces: a file of more than 16 MiB would stay behind.
  $PY "$HERE/gpu_check.py" weights "$run" --out "$OUT" >>"$LOG" 2>&1
  grep -E "epoch [0-9]+:|kNN|images/s|│" "$LOG" | tail -40 >>"$OUT/report.txt"
}

# _train DATA RUN GRAPHS: until it ends or 25 s are left
_train() {
  local more=() rest=$(($(left) - 25))
  [ -n "$TINY" ] && more=(--set net.backbone=resnet_tiny --batch-size 32 --epochs 3)
  timeout -s TERM -k 15 "$rest" $PY -m mocokit pretrain mocov2_cifar10 "$1" --out "$2" --device $DEVICE \
    --set engine.compile=${COMPILE:-auto} --set engine.cuda_graphs=$3 --set save.every_epochs=0 \
    --set monitor.every_epochs=${MONITOR:-10} --set log.every_steps=97 "${more[@]}" >>"$LOG" 2>&1
  CODE=$?
  say "done train, graphs $3: exit $CODE (75: stopped by time, and saved)"
}

prepare() {
  local shared=$1 place=.gpu
  mkdir -p .git/info $place/shared/data $place/shared/tools $place/whl
  grep -qx "/.gpu/" .git/info/exclude 2>/dev/null || echo "/.gpu/" >>.git/info/exclude
  cp -r "$shared/data/cifar10" $place/shared/data/ && cp "$shared/tools/unpack.py" $place/shared/tools/
  [ -n "$(ls $place/whl)" ] || $PY -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d $place/whl \
    pydantic==2.14.4 pydantic_core==2.50.5 annotated-types typing-inspection
  du -sm $place; ls $place $place/whl
}

[ "${1:-}" = prepare ] && { shift; prepare "$@"; exit; }
setup
[ "${1:-all}" = all ] && set -- env together bench_cifar bench_r50 views train
export WITH_RESUME=${WITH_RESUME-1}
for piece in "$@"; do say "--- $piece, $(left) s left"; [ "$piece" = resume ] && unset WITH_RESUME; "piece_$piece"; done
say "end"; echo; echo "================ report"; tail -120 "$OUT/report.txt"
