#!/usr/bin/env bash
# In one environment: pip install 'metagrad[demo,serve]', then leave this running.
#     dpg serve sixseven --out runs/served
# In verl's (verl 0.9): pip install --no-deps metagrad, python prompts.py prompts.txt data 256, then this script.
set -euo pipefail
cd "$(dirname "$0")"
export DPG_REWARD_URL=http://127.0.0.1:8067
# New at every start: what an earlier start left behind must not be mixed with this one.
export DPG_REWARD_RUN="sixseven-$(date +%s)"
export DPG_REWARD_BATCH=train=64x4,test=256x1
python -m verl.trainer.main_ppo --config-path "$PWD" --config-name dpg \
    actor_rollout_ref.model.path="${1:?the generator: a folder or a hub name}"
