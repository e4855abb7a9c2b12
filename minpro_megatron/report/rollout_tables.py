"""Groups and their tokens on a terminal. Untrusted text is escaped, and never interpreted as markup."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minpro_megatron.buffer.journal_reader import GroupRow, StoredGroup, StoredResponse
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.terminal_text import visible


def print_list(console: Console, rows: Sequence[GroupRow], num_found: int) -> None:
    """The groups, one per line."""
    if not rows:
        _line(console, "no group fulfils all conditions")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group", justify="right")
    table.add_column("state")
    for name in ("step", "batch"):
        table.add_column(name, justify="right")
    table.add_column("prompt", overflow="fold")
    for name in ("version", "stale", "reward", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [
            row.group_id, row.state, _or_dash(row.consumed_step), "-" if row.batch_index < 0 else row.batch_index,
            visible(row.prompt_id), _versions(row), _or_dash(row.staleness), _or_dash(row.mean_reward, ".3f"),
            row.num_tokens if row.num_responses else "-",
        ]  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table)
    if len(rows) < num_found:
        _line(console, f"{len(rows)} of {num_found} groups; --limit 0 shows all")


def print_group(
    console: Console, group: StoredGroup, shown: Sequence[StoredResponse], tokenizer: TextTokenizer | None
) -> None:
    """One group: the prompt, its responses `shown`, and a line for every token of these."""
    parts = [f"group {group.group_id}", group.state, f"prompt {visible(group.prompt_id)} ({visible(group.source)})"]
    parts.append(f"issued with version {group.issued_version}")
    if group.consumed_step is not None:
        parts.append(f"consumed at step {group.consumed_step}, {group.staleness} steps stale")
    if group.mean_reward is not None:
        parts.append(f"mean reward {group.mean_reward:g}")
    _line(console, ", ".join(parts))
    if tokenizer is None:
        _line(console, "the tokenizer of the run's model is not available: token ids")
    _line(console, f"prompt, {len(group.prompt_token_ids)} tokens:")
    _print_text(console, group.prompt_token_ids, tokenizer)
    for response in shown:
        _print_response(console, response, tokenizer)


def _print_response(console: Console, response: StoredResponse, tokenizer: TextTokenizer | None) -> None:
    console.print()
    versions = response.policy_versions
    ended = f"ended by {visible(response.finish_reason)}"
    reward = "not graded" if response.reward is None else f"reward {response.reward:g}"
    parts = [f"response {response.place}", reward, f"{response.num_tokens} tokens", ended]
    parts.append(f"sampling seed {response.sampling_seed}")
    if response.token_ids is None or versions is None:
        _line(console, ", ".join(parts))
        _line(console, "its tokens are no longer in the journal (collector.journal_keep_steps)")
        return
    spans = [f"{len(list(members))} of version {version}" for version, members in groupby(versions.tolist())]
    _line(console, ", ".join([*parts, " then ".join(spans)]))
    _print_text(console, response.token_ids, tokenizer)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("place", justify="right")
    table.add_column("token", overflow="fold")
    for name in ("id", "version", "rollout", "behavior", "ratio"):
        table.add_column(name, justify="right")
    columns = [
        _numbers(values, form)
        for values, form in (
            (response.rollout_log_probs, ".5f"), (response.behavior_log_probs, ".5f"), (response.ratios, ".5f"),
        )
    ]  # fmt: skip
    for place, (token_id, version) in enumerate(zip(response.token_ids.tolist(), versions.tolist(), strict=True)):
        token = tokenizer.text(np.asarray([token_id])) if tokenizer else ""
        numbers = [column[place] if column else "-" for column in columns]
        cells = [str(place), visible(token), str(token_id), str(version), *numbers]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _print_text(console: Console, token_ids: np.ndarray, tokenizer: TextTokenizer | None) -> None:
    """Every line after a bar, so that no line can be mistaken for one of this tool."""
    lines = tokenizer.text(token_ids).split("\n") if tokenizer else [" ".join(map(str, token_ids.tolist()))]
    for line in lines:
        _line(console, f"  │ {visible(line)}")


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _versions(row: GroupRow) -> str:
    if row.oldest_version is None:
        return str(row.issued_version)
    same = row.oldest_version == row.newest_version
    return str(row.oldest_version) if same else f"{row.oldest_version}-{row.newest_version}"


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _numbers(values: np.ndarray | None, form: str) -> list[str]:
    return [] if values is None else ["-" if value != value else format(value, form) for value in values.tolist()]
