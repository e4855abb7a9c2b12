"""Conversion between text and token ids with only the `tokenizers` library: transformers' tokenizers import torch."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import ModelFacts, model_file


class TextTokenizer:
    """The tokenizer of a Hugging Face checkpoint. Raises FileNotFoundError or ValueError if there is none."""

    def __init__(self, hf_path: str, facts: ModelFacts) -> None:
        path = model_file(hf_path, "tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for any fault of the file
            raise UserError(f"{path}: not a tokenizer ({error})") from None
        # Truncation or padding left in the file would silently change every prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self._tokenizer.get_vocab_size() > facts.vocabulary_size:
            raise UserError(
                f"{path}: {self._tokenizer.get_vocab_size()} tokens exceed the model's vocab_size = "
                f"{facts.vocabulary_size}; tokenizer and model do not belong together"
            )
        self._stop_token_ids = frozenset(facts.stop_token_ids)
        self._path = path

    @cached_property
    def _literal(self) -> Tokenizer:
        """The tokenizer for which special tokens in a text are ordinary characters."""
        tokenizer = Tokenizer.from_file(str(self._path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode_given(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of texts that others wrote, int32: special tokens in them are ordinary characters."""
        encodings = self._literal.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, int32, without begin or end tokens: for a part of a prompt, and for a text that
        holds its own."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_begin(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, int32, after the begin tokens of this tokenizer, such as `<|begin_of_text|>`. A
        text that starts with them gets no second ones, and one without tokens stays empty."""
        begin = self._begin_ids
        return [
            ids if not len(ids) or np.array_equal(ids[: len(begin)], begin) else np.concatenate([begin, ids])
            for ids in self.encode_all(texts)
        ]

    @cached_property
    def _begin_ids(self) -> np.ndarray:
        """What the post-processor of tokenizer.json puts in front of every text, int32; empty for most models, such as
        Qwen. What it puts behind is left out: the policy continues the text."""
        encoding = self._tokenizer.encode("x", add_special_tokens=True)
        mask = encoding.special_tokens_mask  # 1 for the tokens that the post-processor adds
        return np.asarray(encoding.ids[: mask.index(0) if 0 in mask else 0], dtype=np.int32)

    def response_text(self, token_ids: np.ndarray) -> str:
        """The text that is graded: the response without its stop token and other special tokens."""
        return self.response_texts([token_ids])[0]

    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]:
        """The same for several responses. Unlike the library's `decode` it releases the GIL, so it can run in a
        thread."""
        ids = [response.tolist() for response in responses]
        for of_response in ids:
            if of_response and of_response[-1] in self._stop_token_ids:
                of_response.pop()
        return self._tokenizer.decode_batch(ids, skip_special_tokens=True)

    def text(self, token_ids: np.ndarray) -> str:
        """The text of all these tokens, including special ones. An incomplete character becomes U+FFFD."""
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
