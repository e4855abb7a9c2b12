"""How an answer of the environment becomes tokens: its text alone, between the chat template's markers of a turn.

Tokens that the policy has sampled are never turned into text and tokenized again: another tokenization of the same
text would have other log-probs under the policy, and the trainer would score tokens that nobody sampled.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.errors import UserError
from minpro_megatron.prompts.chat_template import ChatTemplate
from minpro_megatron.prompts.tokenizer import TextTokenizer

CUT = "\n... (the rest is cut)"


@dataclass(frozen=True)
class Framing:
    """The token ids around an answer, int32: after the token that ends the policy's turn, and after the answer."""

    before: np.ndarray
    after: np.ndarray
    tokenizer: TextTokenizer
    max_answer_tokens: int

    @staticmethod
    def of(
        template: ChatTemplate,
        tokenizer: TextTokenizer,
        stop_token_ids: Collection[int],
        role: str,
        max_answer_tokens: int,
    ) -> "Framing":
        """The framing of the template. Raises UserError if the template does not end the policy's turn with one of its
        stop tokens, or changes the texts of turns."""
        before, after = template.around_answer(role)
        (before_ids,), (after_ids,) = tokenizer.encode_all([before]), tokenizer.encode_all([after])
        if not len(before_ids) or int(before_ids[0]) not in stop_token_ids:
            raise UserError(
                f"environment.role = {role}: after a turn of the assistant the chat template writes {before[:40]!r}, "
                f"which does not begin with a stop token ({', '.join(map(str, sorted(stop_token_ids)))}); add the "
                "token that ends a turn to sampling.extra_stop_tokens"
            )
        # the policy has sampled the token that ends its turn
        return Framing(before_ids[1:], after_ids, tokenizer, max_answer_tokens)

    def framed(self, text: str) -> np.ndarray:
        """The token ids of the answer, int32. A text of more than `max_answer_tokens` is cut, and says so. Special
        tokens in the text are ordinary characters: code of the policy must not be able to print the end of a turn."""
        (ids,) = self.tokenizer.encode_given([text])
        if len(ids) > self.max_answer_tokens:
            (cut,) = self.tokenizer.encode_given([CUT])
            ids = np.concatenate([ids[: max(0, self.max_answer_tokens - len(cut))], cut])
        return np.concatenate([self.before, ids, self.after])


def checked_ids(token_ids: Sequence[int], vocabulary_size: int) -> np.ndarray:
    """The token ids that an environment gives itself, int32. Raises ValueError for others than the model's."""
    ids = np.asarray(token_ids, np.int64)
    if ids.ndim != 1 or (len(ids) and (ids.min() < 0 or ids.max() >= vocabulary_size)):
        raise ValueError(f"Answer.token_ids must be ids of the model's {vocabulary_size} tokens")
    return ids.astype(np.int32)
