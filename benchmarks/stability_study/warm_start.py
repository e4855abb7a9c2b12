"""The weights that every run starts from: a model that knows the task and makes mistakes.

    .venv/bin/python -m benchmarks.stability_study.warm_start

The policy is trained on right responses until it can add, then on responses in which a share of the sums is wrong and
those behind continue from the wrong one. It then makes such mistakes itself. initial.safetensors beside this file holds
the result in bfloat16, so that all machines start from the same weights.
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.stability_study import task
from benchmarks.stability_study.policy import Policy
from minpro_megatron.config.seeds import derive_seed

PATH = Path(__file__).resolve().parent / "initial.safetensors"
SEED = 7
RIGHT_UPDATES, NOISY_UPDATES, WARMUP_UPDATES = 600, 100, 50
BATCH = 64
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.01
WRONG_SUMS = 0.07  # share


def noisy_responses(prompts: np.ndarray, wrong: float, random: np.random.Generator) -> np.ndarray:
    """int64 [prompts, 2 x summands]: right responses, but that a share of the sums is off by 1 to 9."""
    shape = len(prompts), task.NUM_STEPS
    errors = random.integers(1, task.VOCABULARY, shape) * (random.random(shape) < wrong)
    shifted = np.concatenate([prompts[:, :1], prompts[:, 1:] + errors], axis=1)
    responses = task.right_responses(shifted)
    responses[:, ::2] = prompts[:, 1:]
    return responses


def train() -> Policy:
    torch.manual_seed(derive_seed(SEED, "weights"))
    policy = Policy()
    for name, weight in policy.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if name.startswith(("tokens", "positions")) else 0.08)
    random = np.random.default_rng(derive_seed(SEED, "prompts"))
    for updates, wrong in ((RIGHT_UPDATES, 0.0), (NOISY_UPDATES, WRONG_SUMS)):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (update + 1) / WARMUP_UPDATES)
            prompts = random.integers(task.VOCABULARY, size=(BATCH, task.PROMPT_TOKENS))
            sequences = np.concatenate([prompts, noisy_responses(prompts, wrong, random)], axis=1)
            loss = -policy.log_probs(torch.from_numpy(sequences))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy


def initial_weights() -> dict[str, Tensor]:
    """The stored weights as float32."""
    return {name: weight.float() for name, weight in load_file(PATH).items()}


def digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> int:
    torch.set_num_threads(1)
    policy = train()
    save_file({name: weight.detach().bfloat16() for name, weight in policy.state_dict().items()}, PATH)
    policy.load_state_dict(initial_weights())
    prompts = task.make_prompts(derive_seed(SEED, "check"), 512)
    sequences = policy.sample(torch.from_numpy(prompts), 1, torch.Generator().manual_seed(SEED))
    accuracy = task.rewards(prompts, sequences[:, task.PROMPT_TOKENS :].numpy()).mean()
    print(f"{PATH.name}: digest {digest(initial_weights())}, right responses {accuracy:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
