"""Shows the rollouts of a run: a list of groups, or every token of one group.

    minpro show runs/demo --step 10:12 --reward :0.25
    minpro show runs/demo --group 321 --response 0
    minpro show runs/demo --step 10 --export step-10.jsonl

The first form lists groups that fulfil all filters; ranges include both ends, and either end may be omitted.
--export writes the chosen groups as rows for `minpro replay`; groups without behavior log-probs (not scored
yet, or pruned) are skipped. RUN_DIR may also be a journal.sqlite. An active run is not disturbed: the tool shows its
state at the time when the tool was started.

Prompts and responses are untrusted text: control characters in them are shown as \\x1b, \\u202e and so on. Tokens
are shown as text if the tokenizer of the run's model is available, else as numbers. The options choose groups and the
form in which they are shown; none is a setting of a run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from minpro_megatron.buffer.journal_file import GROUP_STATES
from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup, StoredResponse
from minpro_megatron.command_line import Parser, command_parser, make_console, whole_number
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.replay.stored_groups import export_groups, without_nan
from minpro_megatron.report.rollout_tables import print_group, print_list

DEFAULT_LIMIT = 40


def _range(number: Callable[[str], float]) -> Callable[[str], tuple[float | None, float | None]]:
    def parse(text: str) -> tuple[float | None, float | None]:
        low, colon, high = text.partition(":")
        try:
            first = number(low) if low else None
            last = (number(high) if high else None) if colon else first
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a range, such as 3, 3:7, 3: or :7") from None
        if not text or (first is not None and last is not None and not first <= last):
            raise argparse.ArgumentTypeError(f"{text!r} is an empty range; the smaller end comes first, as in 3:7")
        return first, last

    return parse


def _parser(prog: str) -> Parser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, or its journal.sqlite")
    choose = parser.add_argument_group("which groups")
    choose.add_argument("--step", type=_range(int), metavar="N[:M]", help="consumed at these global steps")
    choose.add_argument(
        "--reward",
        type=_range(float),
        metavar="LO:HI",
        help="mean reward of the group; --reward=-1:0 if it begins with a minus",
    )
    choose.add_argument("--staleness", type=_range(int), metavar="LO:HI", help="in global steps; of consumed groups")
    choose.add_argument("--state", choices=GROUP_STATES, action="append", help="may be given several times")
    choose.add_argument("--prompt-id", metavar="ID", help="the groups of this prompt")
    choose.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help=f"the first N; 0: all (default: {DEFAULT_LIMIT}, all for --export)",
    )
    choose.add_argument("--group", type=whole_number, metavar="ID", help="one group, with every token")
    choose.add_argument("--response", type=whole_number, metavar="PLACE", help="of --group: only this response, from 0")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per group")
    form.add_argument("--export", type=Path, metavar="FILE.jsonl", help="a new file of rows for minpro replay")
    return parser


def _condition(options: argparse.Namespace) -> tuple[str, tuple[object, ...]]:
    """SQL over GroupRow's fields, and its values."""
    parts: list[str] = []
    values: list[object] = []
    for field, bounds in (
        ("consumed_step", options.step), ("mean_reward", options.reward), ("staleness", options.staleness),
    ):  # fmt: skip
        if bounds is not None:
            parts.append(f"{field} IS NOT NULL")
            for sign, bound in zip((">=", "<="), bounds, strict=True):
                if bound is not None:
                    parts.append(f"{field} {sign} ?")
                    values.append(bound)
    if options.state:
        parts.append(f"state IN ({', '.join('?' * len(options.state))})")
        values += options.state
    for field, value in (("prompt_id", options.prompt_id), ("group_id", options.group)):
        if value is not None:
            parts.append(f"{field} = ?")
            values.append(value)
    return " AND ".join(parts) or "1", tuple(values)


def load_tokenizer(run_dir: Path) -> TextTokenizer | None:
    """The tokenizer of the run's model; None if run.json or the model's folder is not available."""
    try:
        hf_path = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["model"]["hf_path"]
        if not Path(hf_path).is_dir():  # showing rollouts downloads nothing
            return None
        return TextTokenizer(hf_path, read_model_facts(hf_path))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _group_json(group: StoredGroup, shown: Sequence[StoredResponse], tokenizer: TextTokenizer | None) -> dict[str, Any]:
    def text(ids: np.ndarray | None) -> str | None:
        return tokenizer.text(ids) if tokenizer and ids is not None else None

    responses = []
    for response in shown:
        fields = response._asdict() | {"ratios": response.ratios}
        arrays = {name: without_nan(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
        turns = [msgspec.structs.asdict(turn) for turn in response.turns]
        responses.append(fields | arrays | {"turns": turns, "text": text(response.token_ids)})
    fields = group._asdict() | {"mean_reward": group.mean_reward, "prompt": text(group.prompt_token_ids)}
    return fields | {"prompt_token_ids": group.prompt_token_ids.tolist(), "responses": responses}


def _show_group(reader: JournalReader, options: argparse.Namespace, console: Console) -> None:
    group = next(reader.groups("group_id = ?", (options.group,)))
    responses = [r for r in group.responses if options.response in (None, r.place)]
    if not responses and options.response is not None:
        raise UserError(
            f"--response {options.response}: group {group.group_id} has {len(group.responses)} responses, from 0"
        )
    tokenizer = load_tokenizer(reader.path.parent)
    if options.json:
        print(json.dumps(_group_json(group, responses, tokenizer), allow_nan=False))
    else:
        print_group(console, group, responses, tokenizer)


def _show(reader: JournalReader, options: argparse.Namespace, console: Console) -> None:
    limit = (0 if options.export else DEFAULT_LIMIT) if options.limit is None else options.limit
    found = reader.rows(*_condition(options))
    if options.group is not None and not found:
        raise UserError(f"--group {options.group}: the journal has no such group, or a filter excludes it")
    chosen = found[:limit] if limit else found
    if options.export:
        print(export_groups(reader, chosen, options.export))
    elif options.group is not None:
        _show_group(reader, options, console)
    elif options.json:
        for row in chosen:
            print(json.dumps(row._asdict(), allow_nan=False))
    else:
        print_list(console, chosen, len(found))
    if reader.is_live:
        print("the run is still active: this was its state when the tool was started", file=sys.stderr)


def main(arguments: list[str] | None = None, prog: str = "minpro show", console: Console | None = None) -> int:
    """0 on success, 2 after a message about a wrong option or journal."""
    options = _parser(prog).parse_args(arguments)
    if options.response is not None and options.group is None:
        print("error: --response: give the group with --group", file=sys.stderr)
        return 2

    def show() -> int:
        with JournalReader(options.run_dir) as reader:
            _show(reader, options, console or make_console())
        return 0

    return run_reporting(show, reads_given_files=True)
