"""Episodes whose policy follows a script, on servers that are none, with a tokenizer that merges characters."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.framing import Framing
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import IssuedGroup, Prompt
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters

CHARACTERS = "abcdefgh \n<|>_=+0123456789imendstarxu."
SPECIAL = ["<|im_start|>", "<|im_end|>"]
BEFORE, AFTER = "<|im_end|>\n<|im_start|>tool\n", "<|im_end|>\n<|im_start|>assistant\n"
ROUTE_LAYERS, ROUTE_EXPERTS = 2, 1


def write_tokenizer(folder: Path) -> tuple[TextTokenizer, ModelFacts]:
    """Characters, the pairs ab, cd and ef as tokens of their own, and the marks of turns."""
    vocabulary = {character: index for index, character in enumerate(dict.fromkeys(CHARACTERS))}
    for pair in ("ab", "cd", "ef"):
        vocabulary[pair] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d"), ("e", "f")]))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    end = made.token_to_id("<|im_end|>")
    assert end is not None
    facts = ModelFacts(vocabulary_size=64, stop_token_ids=(end,), max_position_embeddings=4096)
    return TextTokenizer(str(folder), facts), facts


class Template:
    def around_answer(self, role: str) -> tuple[str, str]:
        return BEFORE, AFTER


def issued(seeds: Sequence[int], prompt: Sequence[int] = (1, 2, 3), version: int = 0) -> IssuedGroup:
    return IssuedGroup(
        group_id=4,
        batch_index=0,
        policy_version=version,
        prompt=Prompt(id="p4", source="test", text="1+1=", answer="2"),
        prompt_token_ids=np.asarray(prompt, np.int32),
        sampling_seeds=list(seeds),
    )


class ScriptedEnvironment:
    """Answers with what `script` returns for a turn, after `wait`; an exception there is raised."""

    def __init__(self, script: Callable[[EpisodeTurn], Answer | Exception | None]) -> None:
        self._script = script
        self.turns: list[EpisodeTurn] = []

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        self.turns.append(turn)
        await asyncio.sleep(0)
        found = self._script(turn)
        if isinstance(found, Exception):
            raise found
        return found


# From the tokens so far, the seed and the tokens left: the ids of the policy's next turn.
Policy = Callable[[np.ndarray, int, int], Sequence[int]]


class ScriptedServer:
    """Samples what the policy says; `fail_at` names requests (from 0) that raise instead."""

    def __init__(
        self,
        facts: ModelFacts,
        policy: Policy,
        fail_at: dict[int, Exception] | None = None,
        version: int = 0,
        with_routes: bool = False,
    ) -> None:
        self._facts, self._policy, self._fail_at = facts, policy, dict(fail_at or {})
        self.version, self._with_routes = version, with_routes
        self.requests: list[tuple[list[int], int, int, int]] = []  # (tokens, seed, tokens left, version)
        self.num_waits = 0
        self.num_idle = 0

    async def sample(
        self, prompt_token_ids: np.ndarray, seed: int, sampling: SamplingParameters, policy_version: int
    ) -> SampledSequence:
        number = len(self.requests)
        self.requests.append((prompt_token_ids.tolist(), seed, sampling.max_response_tokens, policy_version))
        await asyncio.sleep(0)
        if number in self._fail_at:
            raise self._fail_at[number]
        ids = np.asarray(self._policy(prompt_token_ids, seed, sampling.max_response_tokens), np.int32)
        ids, stops = ids[: sampling.max_response_tokens], self._facts.stop_token_ids
        rows = len(prompt_token_ids) + len(ids) - 1
        routes = np.full((rows, ROUTE_LAYERS, ROUTE_EXPERTS), number, np.uint8) if self._with_routes else None
        return SampledSequence(
            token_ids=ids,
            log_probs=-np.arange(1, len(ids) + 1, dtype=np.float32) / 8,
            policy_versions=np.full(len(ids), self.version, np.int32),
            finish_reason="stop" if ids[-1] in stops else "length",
            routed_experts=routes,
        )

    async def idle[Result](self, waiting: Awaitable[Result]) -> Result:
        self.num_idle += 1
        self.num_waits += 1
        try:
            return await waiting
        finally:
            self.num_idle -= 1


def rules(
    tokenizer: TextTokenizer,
    facts: ModelFacts,
    environment: ScriptedEnvironment,
    max_turns: int = 4,
    max_answer_tokens: int = 64,
    timeout_s: float = 5.0,
) -> EpisodeRules:
    framing = Framing.of(Template(), tokenizer, facts.stop_token_ids, "tool", max_answer_tokens)  # type: ignore[arg-type]
    return EpisodeRules(environment, framing, tokenizer, facts.vocabulary_size, max_turns, timeout_s)
