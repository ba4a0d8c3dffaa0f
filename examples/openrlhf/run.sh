#!/usr/bin/env bash
# In one environment: pip install 'metagrad[demo,serve]', then leave this running.
#     dpg serve sixseven --out runs/served
# In OpenRLHF's (0.11): pip install --no-deps metagrad, then this script; prompts.jsonl has a {"prompt": ...} a line.
set -euo pipefail
cd "$(dirname "$0")"
export DPG_REWARD_URL=http://127.0.0.1:8067
# New at every start: what an earlier start left behind must not be mixed with this one.
export DPG_REWARD_RUN="sixseven-$(date +%s)"
# As --rollout.batch_size and --rollout.n_samples_per_prompt.
export DPG_REWARD_BATCH=64x4
python -m openrlhf.cli.train_ppo_ray \
    --actor.model_name_or_path "${1:?the generator: a folder or a hub name}" \
    --train.agent_func_path "$PWD/agent.py" \
    --data.prompt_dataset prompts.jsonl --data.input_key prompt \
    --rollout.batch_size 64 --rollout.n_samples_per_prompt 4 \
    --rollout.max_new_tokens 96 --data.max_len 128 --rollout.temperature 1.0 \
    --train.batch_size 256 --train.micro_batch_size 16 --rollout.micro_batch_size 16 \
    --algo.advantage.estimator group_norm --algo.kl.init_coef 0.01 --reward.clip_range -100 100 \
    --actor.num_nodes 1 --actor.num_gpus_per_node 1 --ref.num_nodes 1 --ref.num_gpus_per_node 1 \
    --vllm.num_engines 1 --vllm.gpu_memory_utilization 0.5 --train.colocate_all --vllm.enable_sleep \
    --ds.enable_sleep --actor.gradient_checkpointing_enable
