"""OpenRLHF 0.11: each text's reward from `dpg serve`, for `--train.agent_func_path`. See docs/serve.md and run.sh.

Unlike `--reward.remote_url`, this waits without a thread for each sample, scores exactly the tokens that were written,
and lets an error stop the run.
"""

from openrlhf.utils.agent import SingleTurnAgentExecutor

from dpg.serve.ask import Rollout, reward_of
from dpg.serve.config import Config


class AgentExecutor(SingleTurnAgentExecutor):
    """Writes one text, then waits for its reward."""

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        output = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
        ((start, end),) = output["action_ranges"]
        text = hf_tokenizer.decode(output["observation_tokens"][start:end], skip_special_tokens=True)
        config = Config.from_environment()
        answer = await reward_of(Rollout(text, group=prompt), config)
        score = answer.score(config.scale)
        output.update(reward=score, scores=score, extra_logs=answer.figures())
        return output
