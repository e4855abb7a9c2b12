"""The run's prompts: read and tokenized once, then dealt to the batches in an order that the seed decides."""

import logging
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.records import IssuedGroup, Prompt
from minpro_megatron.rollout.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

# A batch touches at most a few epochs; the shuffled order of older ones is not kept.
MAX_CACHED_EPOCHS = 4


class _Row(msgspec.Struct):
    id: str
    source: str
    prompt: str
    answer: str


def load_prompts(path: Path | str, setting: str) -> list[Prompt]:
    """The prompts of a JSON Lines file of `{"id", "source", "prompt", "answer"}`; empty lines do not count.

    `setting` is the name of the setting that holds the path. Raises ValueError naming file, line and field
    for a row that is damaged, a prompt that is empty, or an id that comes twice; and if there are no rows
    at all.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{setting} = {str(path)!r}: {error.strerror}; give a JSON Lines file") from None
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Row)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}: {error}; correct the row or remove it") from None
        if not row.prompt:
            raise ValueError(f"{path}, line {number}: prompt is empty; correct the row or remove it")
        if row.id in line_of_id:
            raise ValueError(
                f"{path}, line {number}: id {row.id!r} is also in line {line_of_id[row.id]}; ids are unique"
            )
        line_of_id[row.id] = number
        prompts.append(Prompt(id=row.id, source=row.source, text=row.prompt, answer=row.answer))
    if not prompts:
        raise ValueError(f"{setting} = {str(path)!r}: the file has no rows")
    return prompts


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    prompt: Prompt
    token_ids: np.ndarray  # int32


def tokenize(prompts: list[Prompt], tokenizer: TextTokenizer, max_tokens: int, setting: str) -> list[TokenizedPrompt]:
    """The prompts of at most `max_tokens` tokens; longer ones are dropped with a warning that counts them.

    Raises ValueError if none is left.
    """
    encoded = tokenizer.encode_all([prompt.text for prompt in prompts])
    kept = [
        TokenizedPrompt(prompt, token_ids)
        for prompt, token_ids in zip(prompts, encoded, strict=True)
        if 0 < len(token_ids) <= max_tokens
    ]
    if dropped := len(prompts) - len(kept):
        log.warning(
            "%s: dropped %d of %d prompts, longer than sampling.max_prompt_tokens = %d or empty as tokens",
            setting, dropped, len(prompts), max_tokens,
        )  # fmt: skip
    if not kept:
        raise ValueError(f"{setting}: no prompt has 1 .. sampling.max_prompt_tokens = {max_tokens} tokens; raise it")
    return kept


class PromptStream:
    """Deals the prompts to the groups: epoch after epoch, each in an order of its own.

    There is no hidden position: a group's prompt and sampling seeds depend on (run seed, group id) alone, and ids count
    in the order of issue, so a run can continue at any group, and the next id is the whole cursor.
    """

    def __init__(self, prompts: list[TokenizedPrompt], config: RunConfig) -> None:
        self._prompts = prompts
        self._seed = config.seed
        self._responses_per_prompt = config.batch.responses_per_prompt
        self._epoch_orders: OrderedDict[int, list[int]] = OrderedDict()

    def group(self, group_id: int, batch_index: int, policy_version: int) -> IssuedGroup:
        """Group `group_id`, to be sampled with `policy_version`."""
        epoch, position = divmod(group_id, len(self._prompts))
        tokenized = self._prompts[self._epoch_order(epoch)[position]]
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

    def _epoch_order(self, epoch: int) -> list[int]:
        if epoch not in self._epoch_orders:
            # Sorting by random() and not shuffle(): of the two only random() is promised to give the same
            # numbers in every version of Python.
            generator = random.Random(derive_seed(self._seed, "prompt order", epoch))
            keys = [generator.random() for _ in self._prompts]
            self._epoch_orders[epoch] = sorted(range(len(keys)), key=keys.__getitem__)
            while len(self._epoch_orders) > MAX_CACHED_EPOCHS:
                self._epoch_orders.popitem(last=False)
        return self._epoch_orders[epoch]
