#!/usr/bin/env bash
# Trains on a Cloud TPU VM: create, copy, install, run on all workers, fetch the results.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-8 [options] -- [FLAGS OF seqrec_jax.main ...]
#   launch/tpu_vm.sh --name=run1 --zone=us-west4-a --type=v5litepod-8 --data=DATA -- --config=configs/sasrec.py:beauty
#
#   --version=IMAGE    the VM's software (default v2-alpha-tpuv5-lite, for v5litepod)
#   --data=FOLDER      is copied too, and given as --config.data.dir
#   --workdir=FOLDER   on the VM (default run). With several hosts it must be one that all of them mount.
#   --results=FOLDER   the workdir is fetched to FOLDER/NAME (default runs)
#   --steps=LIST       some of create,copy,install,run,fetch (default all); to resume: --steps=run,fetch
#   --dry-run          prints the commands and does nothing
#
# Local paths count from the repository's root. Needs gcloud with a project set. The VM stays, and costs, until it is deleted; the last line says how.
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' type='' version=v2-alpha-tpuv5-lite data='' workdir=run results=runs
steps=create,copy,install,run,fetch dry_run=no
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --results=*) results=${1#*=} ;;
    --steps=*) steps=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --) shift && break ;;
    *) echo "tpu_vm.sh: $1 is unknown; the flags of seqrec_jax.main come after --" >&2 && exit 2 ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ]; then
  echo "tpu_vm.sh: --name, --zone and --type are needed; the head of this file explains them" >&2
  exit 2
fi
[ $# -gt 0 ] || set -- --config=configs/cl4srec.py

run() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
  [ "$dry_run" = yes ] || "$@"
}
tpu() { # gcloud's command, with the zone after it
  run gcloud compute tpus tpu-vm "$@" "--zone=$zone"
}
on_all() {
  tpu ssh "$name" --worker=all "--command=$1"
}

create() {
  tpu create "$name" "--accelerator-type=$type" "--version=$version"
}
copy() {
  on_all 'mkdir -p seqrec_jax && rm -rf seqrec_jax/data_sets'
  tpu scp --recurse --worker=all requirements.txt configs seqrec_jax "$name:seqrec_jax/"
  [ -z "$data" ] || tpu scp --recurse --worker=all "$data" "$name:seqrec_jax/data_sets"
}
install() { # uv brings its own Python, whatever the image has
  on_all 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  on_all 'cd seqrec_jax && ~/.local/bin/uv venv --allow-existing --python 3.12 .venv'
  on_all "cd seqrec_jax && ~/.local/bin/uv pip install --python .venv -r requirements.txt 'jax[tpu]'"
}
train() {
  local command
  printf -v command ' %q' .venv/bin/python -m seqrec_jax.main "$@" "--workdir=$workdir" --config.mesh.distributed=true \
    ${data:+--config.data.dir=data_sets}
  on_all "cd seqrec_jax &&$command"
}
fetch() {
  local source=$workdir
  [[ $workdir = /* ]] || source=seqrec_jax/$workdir
  run mkdir -p "$results/$name"
  tpu scp --recurse --worker=0 "$name:$source" "$results/$name/"
}

for step in ${steps//,/ }; do
  case $step in
    create | copy | install | fetch) "$step" ;;
    run) train "$@" ;;
    *) echo "tpu_vm.sh: step $step is unknown; known: create,copy,install,run,fetch" >&2 && exit 2 ;;
  esac
done
echo "# $name is still there; to delete it: gcloud compute tpus tpu-vm delete $name --zone=$zone"
