"""Weights & Biases: what is checked before a run, and histograms in the number of bins that it accepts."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.metrics.histograms import NUM_BINS, bin_edges
from minpro_megatron.monitor.wandb_board import coarse, wandb_problems
from tests.support.run_examples import example_config


def test_a_missing_package_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = example_config(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(wandb_problems(config)) == []
    (line,) = wandb_problems(with_overrides(config, ["wandb.enabled=true"]))
    assert line.startswith("wandb.enabled = true: the package wandb is not installed")
    assert "wandb.enabled=false" in line


def test_bins_are_joined_until_they_are_few_enough() -> None:
    counts = np.arange(NUM_BINS)
    joined, edges = coarse(counts, bin_edges())
    assert len(joined) == NUM_BINS / 2 <= 512
    assert joined.tolist() == counts.reshape(-1, 2).sum(1).tolist()
    assert edges.tolist() == bin_edges()[::2].tolist()
    few = np.array([1, 2, 3]), np.array([0.0, 1.0, 2.0, 3.0])
    assert [part.tolist() for part in coarse(*few)] == [part.tolist() for part in few]
