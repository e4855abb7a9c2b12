"""Groups and their tokens on a terminal. Untrusted text is escaped, and never interpreted as markup."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minpro_megatron.buffer.journal_reader import GroupRow, StoredGroup, StoredResponse
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import NOT_SAMPLED, Turn
from minpro_megatron.terminal_text import visible

GIVEN = "bright_black"  # the style of tokens that the environment gave


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
    spans = [
        f"{len(list(members))} " + ("given" if version == NOT_SAMPLED else f"of version {version}")
        for version, members in groupby(versions.tolist())
    ]
    _line(console, ", ".join([*parts, " then ".join(spans)]))
    for number, turn in enumerate(response.turns, start=1):
        _line(console, _turn(number, turn))
    for ids, style in _parts(response):
        _print_text(console, ids, tokenizer, style)
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
        shown = "given" if version == NOT_SAMPLED else str(version)
        cells = [str(place), visible(token), str(token_id), shown, *numbers]
        table.add_row(*(Text(cell, GIVEN if version == NOT_SAMPLED else "") for cell in cells))
    console.print(table)


def _turn(number: int, turn: Turn) -> str:
    facts = [f"{turn.sampled_tokens} sampled", f"{turn.given_tokens} given"]
    if turn.given_tokens or turn.tool_calls or turn.problem:
        facts += [f"{turn.tool_calls} tool calls", f"{turn.seconds:.2f} s"]
    return f"turn {number}: {', '.join(facts)}" + (f"; failed: {visible(turn.problem)}" if turn.problem else "")


def _parts(response: StoredResponse) -> Iterator[tuple[np.ndarray, str]]:
    """The token ids of each turn of the policy and of the environment, with the style to print them in."""
    assert response.token_ids is not None
    mask = response.loss_mask
    if mask is None:
        yield response.token_ids, ""
        return
    cuts = np.flatnonzero(np.diff(mask)) + 1
    for ids, sampled in zip(np.split(response.token_ids, cuts), np.split(mask, cuts), strict=True):
        yield ids, "" if sampled[0] else GIVEN


def _print_text(console: Console, token_ids: np.ndarray, tokenizer: TextTokenizer | None, style: str = "") -> None:
    """Every line after a bar, so that no line can be mistaken for one of this tool."""
    lines = tokenizer.text(token_ids).split("\n") if tokenizer else [" ".join(map(str, token_ids.tolist()))]
    for line in lines:
        _line(console, f"  │ {visible(line)}", style)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _versions(row: GroupRow) -> str:
    if row.oldest_version is None:
        return str(row.issued_version)
    same = row.oldest_version == row.newest_version
    return str(row.oldest_version) if same else f"{row.oldest_version}-{row.newest_version}"


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _numbers(values: np.ndarray | None, form: str) -> list[str]:
    return [] if values is None else ["-" if value != value else format(value, form) for value in values.tolist()]
