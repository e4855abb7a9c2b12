"""The policy: a small decoder-only transformer, for whole sequences with gradient and for sampling with a cache.

All sequences have the same length, so nothing is padded. Shapes: B sequences, T tokens, H hidden, N heads, D head,
V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.stability_study.task import PROMPT_TOKENS, RESPONSE_TOKENS, VOCABULARY

HIDDEN, HEADS, FEED_FORWARD, LAYERS = 64, 4, 128, 2
MAX_TOKENS = PROMPT_TOKENS + RESPONSE_TOKENS - 1  # the last token is never an input

type Cache = list[tuple[Tensor, Tensor]]  # of each layer the keys and values, [B, N, T, D]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.attention_output = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.down = nn.Linear(FEED_FORWARD, HIDDEN, bias=False)

    def heads(self, hidden_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, N, T, D] each."""
        num_sequences, num_tokens, _ = hidden_BTH.shape
        normed = functional.rms_norm(hidden_BTH, (HIDDEN,))
        queries, keys, values = (
            self.query_key_value(normed).view(num_sequences, num_tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()
        )
        return queries, keys, values

    def rest(self, hidden_BTH: Tensor, attended_BNTD: Tensor) -> Tensor:
        hidden_BTH = hidden_BTH + self.attention_output(attended_BNTD.transpose(1, 2).flatten(2))
        return hidden_BTH + self.down(functional.silu(self.up(functional.rms_norm(hidden_BTH, (HIDDEN,)))))


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(MAX_TOKENS, HIDDEN)
        self._layers = [Layer() for _ in range(LAYERS)]
        self.layers = nn.ModuleList(self._layers)  # the same ones, which makes their weights the policy's
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the tokens that follow."""
        return self._logits(tokens_BT, [])

    def _logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """As `forward`; appends keys and values of each layer to an empty `cache`."""
        hidden = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for layer in self._layers:
            queries, keys, values = layer.heads(hidden)
            cache.append((keys, values))
            hidden = layer.rest(hidden, functional.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        return self.head(functional.rms_norm(hidden, (HIDDEN,)))

    def log_probs(self, sequences_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of the response tokens of whole sequences, [B, response] each."""
        logits = self.forward(sequences_BT[:, :-1])[:, PROMPT_TOKENS - 1 :].log_softmax(-1)
        chosen = logits.gather(2, sequences_BT[:, PROMPT_TOKENS:, None]).squeeze(2)
        return chosen, -(logits.exp() * logits).sum(-1).detach()

    @torch.no_grad()
    def sample(self, prompts_BT: Tensor, per_prompt: int, random: torch.Generator) -> Tensor:
        """Whole sequences [B x per_prompt, T] at temperature 1, the responses of a prompt one after the other.

        A token is the largest of logit + Gumbel noise, and the noise depends on `random` alone: policies that differ
        little sample the same tokens for most of a response.
        """
        num = len(prompts_BT) * per_prompt
        noise = -torch.empty(num, RESPONSE_TOKENS, VOCABULARY).exponential_(generator=random).log()
        prefilled: Cache = []
        logits_BV = self._logits(prompts_BT, prefilled)[:, -1].repeat_interleave(per_prompt, 0)
        caches = [_room(keys, values, per_prompt) for keys, values in prefilled]
        sequences = torch.empty(num, PROMPT_TOKENS + RESPONSE_TOKENS, dtype=torch.int64)
        sequences[:, :PROMPT_TOKENS] = prompts_BT.repeat_interleave(per_prompt, 0)
        for step in range(RESPONSE_TOKENS):
            place = PROMPT_TOKENS + step
            sequences[:, place] = (logits_BV + noise[:, step]).argmax(-1)
            if step + 1 < RESPONSE_TOKENS:
                logits_BV = self._next(sequences[:, place : place + 1], place, caches)
        return sequences

    def _next(self, tokens_B1: Tensor, place: int, caches: Cache) -> Tensor:
        """Logits [B, V] of the tokens behind those at `place`, whose keys and values are added to the caches."""
        hidden = self.tokens(tokens_B1) + self.positions.weight[place]
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            query, keys[:, :, place : place + 1], values[:, :, place : place + 1] = layer.heads(hidden)
            scores = query @ keys[:, :, : place + 1].transpose(2, 3) * (HIDDEN // HEADS) ** -0.5
            hidden = layer.rest(hidden, scores.softmax(-1) @ values[:, :, : place + 1])
        return self.head(functional.rms_norm(hidden, (HIDDEN,)))[:, 0]


def _room(keys: Tensor, values: Tensor, per_prompt: int) -> tuple[Tensor, Tensor]:
    """A cache for `per_prompt` responses to each prompt, with the prompts' keys and values at its beginning."""
    found = []
    for prefilled in (keys, values):
        room = torch.zeros(len(prefilled) * per_prompt, HEADS, MAX_TOKENS, HIDDEN // HEADS)
        room[:, :, : prefilled.shape[2]] = prefilled.repeat_interleave(per_prompt, 0)
        found.append(room)
    return found[0], found[1]
