#!/usr/bin/env bash
# Trains on this machine's devices: makes the environment if there is none, then runs seqrec_jax.main.
#
#   launch/local.sh [--dry-run] [--accelerator=cuda13|tpu] [FLAGS OF seqrec_jax.main ...]
#   launch/local.sh --config=configs/sasrec.py:beauty --config.data.dir=DATA
#
# --dry-run prints the commands and does nothing. VENV names the environment (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=no accelerator='' arguments=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    --accelerator=*) accelerator=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
[ ${#arguments[@]} -gt 0 ] || arguments=(--config=configs/cl4srec.py)
venv=${VENV:-.venv}

run() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
  [ "$dry_run" = yes ] || "$@"
}

run make -s "VENV=$venv" "$venv/.installed"
[ -z "$accelerator" ] || run "$venv/bin/python" -m pip install -q -r requirements.txt "jax[$accelerator]"
run "$venv/bin/python" -m seqrec_jax.main "${arguments[@]}"
