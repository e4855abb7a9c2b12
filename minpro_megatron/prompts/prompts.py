"""The run's prompts: read, selected and tokenized once, then distributed to groups in an order set by the seed."""

import codecs
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.other_files import problem_of_kind, problem_of_schema
from minpro_megatron.prompts.prompt_order import EpochOrder, SourceDraw
from minpro_megatron.prompts.rendering import AS_THEY_ARE, Rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import IssuedGroup, Prompt

log = logging.getLogger(__name__)


class _Row(msgspec.Struct):
    id: str
    source: str
    prompt: str
    answer: str
    pass_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    prefix: str = ""
    system: str = ""
    metadata: Any = None


def load_prompts(path: Path | str, setting: str) -> list[Prompt]:
    """The prompts of a JSON Lines file of `{"id", "source", "prompt", "answer"}` and optionally `"pass_rate"`,
    `"prefix"`, `"system"` and `"metadata"`, which may have any content. Other fields, empty lines and a byte order mark
    are ignored.

    `setting` is the name of the setting that holds the path. Raises UserError naming file, line and field if a row
    is damaged, a prompt is empty, or an id is not unique, and if there are no rows.
    """
    path = Path(path)
    lines = read_lines(path, setting)
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _read_row(path, number, line)
        if not row.prompt:
            raise UserError(f"{path}, line {number}: prompt is empty; correct the row or remove it")
        if row.id in line_of_id:
            raise UserError(
                f"{path}, line {number}: id {row.id!r} is also in line {line_of_id[row.id]}; ids are unique"
            )
        line_of_id[row.id] = number
        prompts.append(
            Prompt(
                id=row.id,
                source=row.source,
                text=row.prompt,
                answer=row.answer,
                prefix=row.prefix,
                pass_rate=row.pass_rate,
                system=row.system,
                metadata=row.metadata,
            )
        )
    if not prompts:
        raise UserError(f"{setting} = {str(path)!r}: the file has no rows")
    return prompts


def read_lines(path: Path, setting: str) -> list[bytes]:
    """The lines of a JSON Lines file, without a byte order mark. Raises UserError, with the name of the setting or
    option that holds the path, if it cannot be read or is another kind of file."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            if problem := problem_of_kind(path, head):
                raise UserError(f"{setting} = {str(path)!r}: {problem}")
            return (head + file.read()).removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{setting} = {str(path)!r}: {error.strerror}; give a JSON Lines file") from None


def _read_row(path: Path, number: int, line: bytes) -> _Row:
    try:
        row = msgspec.json.decode(line, type=_Row)
        msgspec.msgpack.encode(row.metadata)  # the form in which graders receive it
        return row
    except OverflowError:
        raise UserError(
            f"{path}, line {number}: metadata has an integer of more than 64 bits; write it as a text"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        remedy = problem_of_schema(path, line) or "correct the row or remove it"
        raise UserError(f"{path}, line {number}: {error}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{path}, line {number}: it is nested too deeply; correct the row or remove it") from None


def select_prompts(prompts: list[Prompt], data: DataConfig) -> list[Prompt]:
    """The training prompts selected by the weights and pass rates of `data`; excluded ones are counted in the log.

    Raises UserError naming setting, value, rule and remedy if the weights do not name exactly the file's sources, if
    a curriculum has no pass rates, and if no prompt is left.
    """
    _refuse_other_sources(prompts, data)
    if data.curriculum == "easy_first" and all(prompt.pass_rate is None for prompt in prompts):
        raise UserError(
            f"data.curriculum = easy_first: no row of data.train_file = {data.train_file!r} has a pass_rate; add them, "
            "or set data.curriculum to none"
        )
    weighted = [prompt for prompt in prompts if data.source_weights.get(prompt.source, 1) > 0]
    kept = weighted
    if data.selects_by_pass_rate:
        low, high = data.min_pass_rate, data.max_pass_rate
        kept = [prompt for prompt in weighted if prompt.pass_rate is not None and low <= prompt.pass_rate <= high]
        unknown = sum(prompt.pass_rate is None for prompt in weighted)
        log.info(
            "data.train_file: excluded %d of %d prompts by data.min_pass_rate = %g and data.max_pass_rate = %g, "
            "%d of them without a pass_rate",
            len(weighted) - len(kept), len(weighted), low, high, unknown,
        )  # fmt: skip
        if not kept:
            raise UserError(
                f"data.min_pass_rate = {low:g}, data.max_pass_rate = {high:g}: none of the {len(weighted)} prompts "
                f"lies between them ({unknown} have no pass_rate); widen the bounds, or add pass_rate to the rows"
            )
    if len(weighted) < len(prompts):
        log.info("data.train_file: excluded %d of %d prompts of sources of weight 0", len(prompts) - len(weighted),
                 len(prompts))  # fmt: skip
    return kept


def refuse_too_few(heldout: list[Prompt], path: str, wanted: int) -> None:
    """Raises UserError if the held-out file has fewer rows than the evaluation needs."""
    if len(heldout) < wanted:
        raise UserError(
            f"evaluation.num_prompts = {wanted}: data.heldout_file = {path!r} has only {len(heldout)} rows; lower "
            "evaluation.num_prompts"
        )


def _refuse_other_sources(prompts: Iterable[Prompt], data: DataConfig) -> None:
    if not data.source_weights:
        return
    present, named = {prompt.source for prompt in prompts}, set(data.source_weights)
    if unknown := sorted(named - present):
        raise UserError(
            f"data.source_weights: {unknown[0]!r} is not a source of data.train_file = {data.train_file!r}; sources: "
            f"{', '.join(sorted(present))}"
        )
    if unnamed := sorted(present - named):
        raise UserError(
            f"data.source_weights = {data.source_weights} lacks the source {unnamed[0]!r} of data.train_file = "
            f"{data.train_file!r}: name every source, with weight 0 for those to exclude"
        )


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    prompt: Prompt
    token_ids: np.ndarray  # int32


def tokenize(
    prompts: list[Prompt],
    tokenizer: TextTokenizer,
    max_tokens: int,
    setting: str,
    rendering: Rendering = AS_THEY_ARE,
) -> list[TokenizedPrompt]:
    """The prompts of at most `max_tokens` tokens, including the prefix. Longer ones are dropped, with a warning that
    counts them.

    Raises UserError if no prompt is left.
    """
    kept = fitting(prompts, tokenizer, max_tokens, rendering)
    if dropped := len(prompts) - len(kept):
        log.warning(
            "%s: dropped %d of %d prompts, longer than sampling.max_prompt_tokens = %d or empty as tokens",
            setting, dropped, len(prompts), max_tokens,
        )  # fmt: skip
    if not kept:
        raise none_fits(setting, max_tokens)
    return kept


def none_fits(setting: str, max_tokens: int) -> UserError:
    """The error of a file without a prompt of an allowed length."""
    return UserError(f"{setting}: no prompt has 1 .. sampling.max_prompt_tokens = {max_tokens} tokens; raise it")


def fitting(
    prompts: Sequence[Prompt], tokenizer: TextTokenizer, max_tokens: int, rendering: Rendering = AS_THEY_ARE
) -> list[TokenizedPrompt]:
    """The prompts of 1 to `max_tokens` tokens, including the prefix.

    A prefix is tokenized separately from the text before it, so the boundary lies between the same tokens for every
    prefix.
    """
    encoded = rendering.encode(prompts, tokenizer)
    prefixes = tokenizer.encode_all([prompt.prefix for prompt in prompts])
    return [
        TokenizedPrompt(prompt, np.concatenate([token_ids, prefix_ids]))
        for prompt, token_ids, prefix_ids in zip(prompts, encoded, prefixes, strict=True)
        if len(token_ids) and len(token_ids) + len(prefix_ids) <= max_tokens
    ]


class PromptStream:
    """Distributes the prompts to the groups, epoch after epoch, each epoch in its own order. With `data.source_weights`
    a source is drawn for each group first, and each source has its own epochs.

    There is no hidden position: a group's prompt and sampling seeds depend only on (run seed, group id), and ids follow
    the order of issue, so a run can continue at any group, and the next id is the complete state.
    Raises UserError if a source with a positive weight has no prompt.
    """

    def __init__(self, prompts: list[TokenizedPrompt], config: RunConfig) -> None:
        self._seed = config.seed
        self._responses_per_prompt = config.batch.responses_per_prompt
        easy_first = config.data.curriculum == "easy_first"
        weights = config.data.source_weights
        if weights:
            self._prompt = _by_source(prompts, weights, config.seed, easy_first)
        else:
            order = _order(prompts, config.seed, "prompt order", easy_first)
            self._prompt = lambda group_id: prompts[order[group_id]]

    def group(self, group_id: int, batch_index: int, policy_version: int) -> IssuedGroup:
        """Group `group_id`, to be sampled with `policy_version`."""
        tokenized = self._prompt(group_id)
        seeds = [
            derive_seed(self._seed, "sampling", group_id, response) for response in range(self._responses_per_prompt)
        ]
        return IssuedGroup(
            group_id=group_id,
            batch_index=batch_index,
            policy_version=policy_version,
            prompt=tokenized.prompt,
            prompt_token_ids=tokenized.token_ids,
            sampling_seeds=seeds,
        )


def _order(prompts: list[TokenizedPrompt], seed: int, name: str, easy_first: bool) -> EpochOrder:
    hardness = [1 - rate if (rate := tokenized.prompt.pass_rate) is not None else 2.0 for tokenized in prompts]
    return EpochOrder(len(prompts), seed, name, hardness if easy_first else None)


def _by_source(
    prompts: list[TokenizedPrompt], weights: dict[str, float], seed: int, easy_first: bool
) -> Callable[[int], TokenizedPrompt]:
    of_source = {name: [p for p in prompts if p.prompt.source == name] for name, weight in weights.items() if weight}
    for name, members in of_source.items():
        if not members:
            raise UserError(
                f"data.source_weights: the source {name!r} has weight {weights[name]:g}, but the pass rates and "
                "sampling.max_prompt_tokens leave none of its prompts; relax those, or give it weight 0"
            )
    draw = SourceDraw(weights, seed)
    orders = {name: _order(members, seed, f"prompt order of {name}", easy_first) for name, members in of_source.items()}

    def prompt(group_id: int) -> TokenizedPrompt:
        name, position = draw.place(group_id)
        return of_source[name][orders[name][position]]

    return prompt
