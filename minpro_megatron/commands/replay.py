"""Train-only replay of stored rollouts on any mesh: for debugging, and for reproducing a bad step.

    minpro replay --model HF_DIR --rollouts FILE.jsonl --objective minpro --set clip_high=4 \\
        --parallel tensor=2,expert=2,context=2 --mini-batch-groups 8 --output DIR

Rows of FILE, one JSON object per line:
    group               str      rows with the same value are a group, in any order: advantages are relative to it
    prompt_ids          [int]    at least one, each below the model's vocab_size
    response_ids        [int]    may be empty: then only its reward counts, in its group's mean and deviation
    behavior_log_probs  [float]  one per response token, under the weights that sampled it
    reward              float
    loss_mask           [0|1]    optional: 0 excludes a response token, also from scans and counts
    rollout_log_probs   [float]  the engine's; needed by loss.truncated_importance, icepop, sequence_importance,
                                 rejection and off_policy_masking
    kept_ids            [[int]]  with sampling.top_k: what truncated sampling kept at each response token, its own id
                                 among them; [] for tokens that loss_mask excludes and that were not sampled
Other fields are ignored. A group of one row and a group with equal rewards have advantage 0. All rows are checked
before any rank starts; errors are reported with file, line and field, one line per problem, and exit status 2.

Groups are in the order of their first rows. Each update uses the next --mini-batch-groups of them; after the last one
they start again, until there have been --updates. AdamW's state is kept between updates, the learning rate is constant.

Written to DIR when everything is complete, summary.json last; other files in DIR are kept:
    summary.json  {"updates": [{"loss", "grad_norm", "num_tokens"}, ...]}: the norm is that before clipping
    tokens.jsonl  {"log_probs", "coefficients", "prefix_min", "advantage"} of every row, in the file's order, under the
                  initial weights; d loss / d log_prob = - coefficient / trained tokens (token-mean), or
                  - coefficient / (trained tokens of the row * rows with any) for sequence-mean; 0 for masked
                  tokens; prefix_min is 1 if no trained token comes before
    model/        Hugging Face folder of the weights after the last update

Options that are settings of a run have the defaults and descriptions of these settings. Files, groups and the number of
updates are the replay's own, and --set reaches the other settings that affect it.
"""

import sys
from pathlib import Path

from minpro_megatron.command_line import Parser, command_parser, count
from minpro_megatron.config.mesh_option import add_parallel
from minpro_megatron.config.options import field_at, given_settings
from minpro_megatron.errors import run_reporting
from minpro_megatron.replay.settings import SETTING_OPTIONS, SETTINGS, ReplayOptions

PACKING = {"on": True, "off": False}


def _parser(prog: str) -> Parser:
    parser = command_parser(__doc__, prog)
    files = parser.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="config.json and safetensors")
    files.add_argument("--rollouts", type=Path, required=True, metavar="FILE.jsonl", help="the rows, as above")
    files.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="the folder of the run that sampled the rows: its run.json gives sampling.temperature, top_k and "
        "max_response_tokens, and rows or settings that do not fit are refused",
    )
    files.add_argument("--output", type=Path, required=True, metavar="DIR", help="new, empty or an earlier output")
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--objective", required=True, metavar="NAME", help="minpro, cispo, grpo, ...; a wrong name lists all"
    )
    loss.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"a setting of the objective by its name (clip_high=4), or one of {', '.join(SETTINGS)} with its path",
    )
    updates = parser.add_argument_group("updates")
    updates.add_argument("--mini-batch-groups", type=count, metavar="N", help="groups per update (default: all)")
    updates.add_argument("--updates", type=count, metavar="N", help="default: one per mini-batch")
    ranks = parser.add_argument_group("ranks")
    add_parallel(ranks)
    for container, options in ((updates, SETTING_OPTIONS["updates"]), (ranks, SETTING_OPTIONS["ranks"])):
        for option in options:
            option.add_to(container)
    packing = (field_at("batch.packing").description or "").rstrip(".")
    ranks.add_argument("--packing", choices=list(PACKING), help=f"{packing} (default: on)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "minpro replay") -> int:
    """0 when the output is complete, 1 if it failed, 2 after a message about a wrong option or input."""
    given = vars(_parser(prog).parse_args(arguments))

    def run() -> int:
        print(f"checking the rows of {given['rollouts']}", file=sys.stderr, flush=True)  # the next import takes seconds
        from minpro_megatron.replay.run import run_replay  # imports torch

        every = [option for group in SETTING_OPTIONS.values() for option in group]
        settings = given_settings(every, given)
        if given["packing"] is not None:
            settings["batch.packing"] = PACKING[given["packing"]]
        not_own = {"packing", *(option.destination for option in every)}
        own = {name: value for name, value in given.items() if name not in not_own}
        return run_replay(ReplayOptions(**own, given=settings))

    return run_reporting(run)
