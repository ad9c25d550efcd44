#!/bin/bash
# The `full` preset on several nodes of eight GPUs each, resumed where it was when the job is submitted again.
#     sbatch docs/slurm.sh
# Not run on a cluster so far. The project's folder must be the same on all nodes (a shared file system): workers read
# the run's state and the tokenised text from it. 256 rows a step: 2, 4, 8, ... GPUs share them evenly.
#SBATCH --job-name=threefold
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00

set -euo pipefail
source .venv/bin/activate
run=${RUN:-full}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

threefold run --preset full --run "$run" --only data
for stage in pretrain sft dpo; do
    # one torchrun a node, which starts one worker a GPU; -- keeps torchrun from taking --run for an option of its own
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$stage" --rdzv-endpoint "$first:29500" \
        -m -- study train "$stage" --run "$run"
    threefold run --run "$run" --only "$stage" # its notebook: finds the training done, and publishes it
done
threefold run --run "$run" # evaluations and the comparison
