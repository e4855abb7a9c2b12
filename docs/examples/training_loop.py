"""A tiny policy learns to count with MinPRO in plain torch, on samples of weights that are up to 7 updates old."""

import copy

import torch

from minpro_megatron.objective import group_advantages, minpro_loss

VOCABULARY, LENGTH, GROUP, UPDATES, PERIOD = 8, 6, 32, 240, 8

torch.manual_seed(0)
policy = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, VOCABULARY))
optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)


@torch.no_grad()
def sampled_tokens(model: torch.nn.Module) -> torch.Tensor:  # [GROUP, 1 + LENGTH]; the first token is the prompt
    tokens = torch.zeros(GROUP, 1, dtype=torch.int64)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, torch.multinomial(model(tokens[:, -1]).softmax(-1), 1)], dim=1)
    return tokens


def log_probs_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:  # [GROUP, LENGTH]
    return model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


for update in range(UPDATES):
    if update % PERIOD == 0:
        behavior = copy.deepcopy(policy).requires_grad_(False)
    tokens = sampled_tokens(behavior)
    rewards = (tokens.diff() == 1).float().mean(dim=1)  # the share of tokens that count on from the one before
    advantages = torch.from_numpy(group_advantages(rewards.tolist()))
    mask, metrics = torch.ones(GROUP, LENGTH), {}
    loss = minpro_loss(log_probs_of(policy, tokens), log_probs_of(behavior, tokens), advantages, mask, metrics=metrics)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (update + 1) % 40 == 0:
        print(f"update {update + 1}: mean reward {rewards.mean():.2f}, largest ratio {metrics['ratio/max']:.2f}")
