#!/bin/bash
# Nodes to work on: a shell in an allocation of Slurm, or one command. See --help.
#
# Account and partition are those of the #SBATCH lines of slurm/train.sbatch; edit them there, or here:
ACCOUNT=${ACCOUNT:-}     # 1. who pays
PARTITION=${PARTITION:-} # 2. where
NODES=${NODES:-1}        # 3. how many
GPUS=${GPUS:-1}          # 4. of each node; one task per GPU
CPUS=${CPUS:-8}          # of each task: the rank itself and its data workers
TIME=${TIME:-1:00:00}

set -euo pipefail

usage() {
    cat <<'HELP'
usage: slurm/interactive.sh [--nodes N] [--gpus N] [--cpus N] [--time T] [--OPTION=VALUE of salloc ...]
                            [RUN.yaml [--set ...] | -- COMMAND ...]

  slurm/interactive.sh --nodes 2 --gpus 8            a shell in an allocation of 2 x 8 GPUs; in it:
      vlm-dist launch configs/run.yaml                   the run on all of it; again and again, while the time lasts
      vlm-dist launch configs/run.yaml --nodes 1         on a part of it
      vlm-dist launch configs/run.yaml --doctor          examine the nodes
      vlm-dist launch configs/run.yaml --dry-run         the srun that this would be
      exit                                               gives the nodes back
  slurm/interactive.sh --gpus 4 configs/run.yaml --set train.max_steps=20
                                                     vlm-dist launch of that run, and the nodes are given back at its end
  slurm/interactive.sh -- srun nvidia-smi            any other command

--nodes, --gpus (of each node), --cpus (of each task) and --time are also variables (NODES=2 ...), as are ACCOUNT and
PARTITION; without them the #SBATCH lines of slurm/train.sbatch count. Options of salloc have the form --name=value.
A run here is not requeued at the end of the time: sbatch slurm/train.sbatch does that.
HELP
}

# What train.sbatch says; nothing where its line is still the one that it was shipped with.
shipped() {
    local value
    value=$(sed -n "/^#SBATCH --$1=/{s/^[^=]*=\([^[:space:]]*\).*/\1/p;q}" "$(dirname "$0")/train.sbatch" 2>/dev/null || true)
    [[ $value == "$2" ]] || echo "$value"
}

fail() {
    echo "error: $*; see slurm/interactive.sh --help" >&2
    exit 2
}

options=() run_file=
while (($# > 0)); do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --nodes=* | --gpus=* | --cpus=* | --time=*)
        option=${1%%=*} value=${1#*=}
        shift
        set -- "$option" "$value" "$@"
        ;;
    --nodes | --gpus | --cpus | --time)
        (($# > 1)) || fail "$1 needs a value"
        name=${1#--}
        printf -v "${name^^}" %s "$2"
        shift 2
        ;;
    --)
        shift
        break
        ;;
    --*=*)
        options+=("$1")
        shift
        ;;
    -*) fail "$1 is not known; options of salloc have the form --name=value" ;;
    *)
        run_file=$1
        set -- vlm-dist launch "$@"
        break
        ;;
    esac
done
for name in NODES GPUS CPUS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "--${name,,} ${!name}: expected a whole number of at least 1"
done
command -v salloc >/dev/null || fail "there is no salloc on the PATH: this is no login node of a Slurm cluster"
[[ -z ${SLURM_JOB_ID:-} ]] || fail "this shell is in job $SLURM_JOB_ID already: vlm-dist launch works right here"

ACCOUNT=${ACCOUNT:-${SALLOC_ACCOUNT:-$(shipped account my-account)}}
PARTITION=${PARTITION:-${SALLOC_PARTITION:-$(shipped partition gpu)}}
[[ -z $ACCOUNT ]] || options+=("--account=$ACCOUNT")
[[ -z $PARTITION ]] || options+=("--partition=$PARTITION")

if [[ -z ${VIRTUAL_ENV:-} && -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091  # made by the user
    source .venv/bin/activate
fi
if [[ -n $run_file ]]; then # found out now, and not after the wait for nodes
    [[ -f $run_file ]] || fail "there is no run file $run_file in $PWD"
    command -v vlm-dist >/dev/null || fail "there is no vlm-dist on the PATH: activate the environment that has it"
fi
(($# > 0)) || echo "the prompt that comes is in the allocation: vlm-dist launch RUN.yaml; exit gives it back" >&2
exec salloc --job-name=vlm-dist-interactive --nodes="$NODES" --gpus-per-node="$GPUS" --ntasks-per-node="$GPUS" \
    --cpus-per-task="$CPUS" --time="$TIME" "${options[@]}" "$@"
