"""Correct responses that exist already, for prefixes: those in the journals of earlier runs, and texts of a file."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup, StoredResponse
from minpro_megatron.config.reward import RewardConfig, is_right
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.recipe import read_config
from minpro_megatron.models.model_files import ModelFacts, model_file, read_model_facts
from minpro_megatron.prompt_sets.prefixes import PREFIXED, Trace
from minpro_megatron.prompts.prompts import read_lines
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.graders import Graders, SampledText


@dataclass
class GivenTraces:
    """The trace of each prompt that has one, and what was not used, by reason."""

    traces: dict[str, Trace] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


class _Text(msgspec.Struct):
    """A row of a file of texts: somebody's whole response to the prompt `id`."""

    id: str
    response: str
    model: str = ""


def add_traces_of_run(given: GivenTraces, run_dir: Path, prompts: Sequence[Prompt], model: str) -> None:
    """Adds to `given`, for each prompt without a trace, the first correct response in the run's journal, of whatever
    policy version. A response to a prefixed prompt counts together with its prefix.

    A group is used only if its prompt has the tokens that this prompt had in that run: the same question, instruction
    and chat template. The text is that of the run's own tokenizer, which may be another than that of `model`.
    Raises UserError for a folder without a run, and JournalError for a damaged journal.
    """
    with JournalReader(run_dir) as reader:
        config = read_config(reader.path.with_name("run.json"), "--runs")
        run = _JournalTraces(config, prompts, model)
        for row in reader.rows():
            prompt_id = row.prompt_id.partition(PREFIXED)[0]
            if prompt_id in given.traces or row.state == "issued":
                continue
            if prompt_id not in run.question_ids:
                given.unused["groups of other prompts"] += 1
                continue
            for group in reader.groups("group_id = ?", (row.group_id,)):
                trace = run.trace(prompt_id, group, given.unused)
                if trace is not None:
                    given.traces[prompt_id] = trace


class _JournalTraces:
    """The correct responses of one run, as traces."""

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], model: str) -> None:
        path = config.model.hf_path
        try:
            self._facts = read_model_facts(path, config.sampling.extra_stop_tokens)
            self._tokenizer = TextTokenizer(path, self._facts)
            encoded = make_rendering(config.data, path).encode(prompts, self._tokenizer)
            self._is_own_tokenizer = _tokenizer_file(path) == _tokenizer_file(model)
        except OSError as error:
            raise UserError(f"--runs {config.run_dir}: its tokenizer is needed to read its tokens: {error}") from None
        self.question_ids = {prompt.id: ids for prompt, ids in zip(prompts, encoded, strict=True)}
        self._config = config

    def trace(self, prompt_id: str, group: StoredGroup, unused: Counter[str]) -> Trace | None:
        """The group's first correct response; None without one."""
        question = self.question_ids[prompt_id]
        given, prefix = np.split(group.prompt_token_ids, [len(question)])
        if not np.array_equal(given, question):
            unused["groups of other prompts"] += 1
            return None
        for response in group.responses:
            if not is_right(response.reward, self._config.reward.right_reward):
                continue
            if response.token_ids is None:
                unused["correct responses whose tokens were pruned"] += 1
            elif response.finish_reason != "stop" or response.num_given:
                unused["correct responses that were cut off, or of several turns"] += 1
            else:
                return self._as_trace(np.concatenate([prefix, _without_stop(response, self._facts)]))
        return None

    def _as_trace(self, token_ids: np.ndarray) -> Trace:
        text = self._tokenizer.response_text(token_ids)
        is_exact = self._is_own_tokenizer and self._tokenizer.text(token_ids) == text
        return Trace(text, f"run {self._config.name}", token_ids if is_exact else None)


def _tokenizer_file(model: str) -> bytes:
    return model_file(model, "tokenizer.json").read_bytes()


def _without_stop(response: StoredResponse, facts: ModelFacts) -> np.ndarray:
    token_ids = response.token_ids
    assert token_ids is not None
    return token_ids[:-1] if len(token_ids) and int(token_ids[-1]) in facts.stop_token_ids else token_ids


def add_traces_of_texts(
    given: GivenTraces, path: Path, prompts: Sequence[Prompt], tokenizer: TextTokenizer, reward: RewardConfig
) -> None:
    """Adds to `given`, for each prompt without a trace, the first text of the file that the reward calls correct.

    Texts with special tokens of `tokenizer` are not used: read again as a prefix, they would be these tokens. Raises
    UserError for a row that is damaged, and if no row has the id of a prompt.
    """
    known = {prompt.id: prompt for prompt in prompts if prompt.id not in given.traces}
    rows = list(_read_texts(path))
    if not any(row.id in {prompt.id for prompt in prompts} for row in rows):
        raise UserError(
            f"--texts {path}: none of its {len(rows)} rows has the id of a prompt, such as {prompts[0].id!r}"
        )
    by_prompt: dict[str, list[_Text]] = {}
    for row in rows:
        if row.id not in known:
            given.unused["texts of other prompts, or of prompts with a trace"] += 1
        elif _has_special_tokens(row.response, tokenizer):
            given.unused["texts with special tokens"] += 1
        else:
            by_prompt.setdefault(row.id, []).append(row)
    given.traces |= asyncio.run(_first_right_texts(by_prompt, known, tokenizer, reward, given.unused))


async def _first_right_texts(
    by_prompt: Mapping[str, Sequence[_Text]],
    prompts: Mapping[str, Prompt],
    tokenizer: TextTokenizer,
    reward: RewardConfig,
    unused: Counter[str],
) -> dict[str, Trace]:
    async with Graders(reward) as graders:

        async def first_right(prompt_id: str) -> Trace | None:
            for row in by_prompt[prompt_id]:
                (token_ids,) = tokenizer.encode_all([row.response])
                text = SampledText(row.response, token_ids, "stop")
                (judged,) = await graders.judge(prompts[prompt_id], [text])
                if is_right(judged.reward, reward.right_reward):
                    return Trace(row.response, row.model or "texts")
                unused["texts that the reward does not call correct"] += 1
            return None

        found = await asyncio.gather(*map(first_right, by_prompt))
    return {prompt_id: trace for prompt_id, trace in zip(by_prompt, found, strict=True) if trace is not None}


def _read_texts(path: Path) -> Iterator[_Text]:
    for number, line in enumerate(read_lines(path, "--texts"), start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"--texts {path}, line {number}: {error}; a row has the texts id and response, and may have model"
            ) from None
        if not row.response:
            raise UserError(f"--texts {path}, line {number}: response is empty; remove the row")
        yield row


def _has_special_tokens(text: str, tokenizer: TextTokenizer) -> bool:
    return not np.array_equal(tokenizer.encode_all([text])[0], tokenizer.encode_given([text])[0])
