"""No setting is forgotten in the rules of runs on demonstrations (config/demonstrations.py)."""

import pytest

from minpro_megatron.config.demonstrations import OF_SAMPLED_RESPONSES
from minpro_megatron.config.listing import fields_of
from minpro_megatron.config.run import RunConfig

# By section: the settings that mean something in a run on demonstrations.
USED = {
    "data": "accept_changed_inputs instruction chat_template chat_template_arguments demonstrations",
    "batch": "num_prompts responses_per_prompt mini_batch_prompts max_tokens_per_row packing",
    "sampling": "max_prompt_tokens max_response_tokens extra_stop_tokens",
    "staleness": "",
    "optimizer": "learning_rate warmup_global_steps schedule decay_global_steps min_learning_rate beta1 beta2 epsilon "
    "weight_decay clip_grad cpu_offload megatron",
    "model": "hf_path megatron_path dtype backend attention_backend recompute recompute_modules recompute_layers "
    "megatron",
}
# Settings without meaning in it that need no rule: another setting, which has one, switches on what they are about, or
# they must be given in every run.
FOLLOWING = {
    "data": "train_file heldout_file",
    "batch": "over_sampling",
    "sampling": "top_p max_turns",
    "staleness": "max_staleness",
    "optimizer": "reference_effective_sample_size",
}


@pytest.mark.parametrize("section", USED)
def test_every_setting_has_a_meaning_or_a_rule(section: str) -> None:
    """A new setting of these sections fails here until it is in one of the lists."""
    settings = {path for path, _ in fields_of(RunConfig) if path.partition(".")[0] == section}
    listed = [f"{section}.{name}" for name in f"{USED[section]} {FOLLOWING.get(section, '')}".split()]
    ruled = [path for path in OF_SAMPLED_RESPONSES if path.partition(".")[0] == section]
    assert sorted([*listed, *ruled]) == sorted(settings)


def test_every_rule_is_of_a_setting() -> None:
    assert OF_SAMPLED_RESPONSES.keys() <= {path for path, _ in fields_of(RunConfig)}
