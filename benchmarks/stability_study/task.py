"""The task: a register of one decimal digit and 32 additions to it, written out step by step.

A prompt is the first value and 32 summands; its one right response repeats every summand and writes the sum modulo 10
so far behind it. Tokens are the digits.

>>> prompts = np.array([[7, 5, 1]])
>>> right_responses(prompts).tolist()
[[5, 2, 1, 3]]
"""

import numpy as np

NUM_STEPS = 32
PROMPT_TOKENS = NUM_STEPS + 1
RESPONSE_TOKENS = 2 * NUM_STEPS
VOCABULARY = 10


def make_prompts(seed: int, count: int) -> np.ndarray:
    """int64 [count, 33]."""
    return np.random.default_rng(seed).integers(VOCABULARY, size=(count, PROMPT_TOKENS))


def right_responses(prompts: np.ndarray) -> np.ndarray:
    """int64 [prompts, 2 x summands]."""
    values = np.cumsum(prompts, axis=1) % VOCABULARY
    return np.stack([prompts[:, 1:], values[:, 1:]], axis=2).reshape(len(prompts), -1)


def rewards(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """float64 [responses]: 1 if every token is right, else 0; a response for each prompt."""
    return (responses == right_responses(prompts)).all(axis=1).astype(np.float64)
