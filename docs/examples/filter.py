"""An example of a filter of groups: `data.filter=docs.examples.filter:teaches`.

tests/unit/hooks/test_hook_examples.py filters groups with it as a run does.
"""

from minpro_megatron.records import CollectedGroup

MIN_FINISHED_SHARE = 0.5


def teaches(group: CollectedGroup) -> bool:
    """Keeps a group whose rewards differ, as DAPO's dynamic sampling does (arXiv:2503.14476), and of whose responses at
    least half ended before the length limit.

    For a group that is dropped another prompt is sampled. The decision must depend on the group alone: after a crash a
    group may be sampled again, and must then be treated alike.
    """
    finished = sum(response.finish_reason == "stop" for response in group.responses)
    rewards = {response.reward for response in group.responses}
    return len(rewards) > 1 and finished >= MIN_FINISHED_SHARE * len(group.responses)
