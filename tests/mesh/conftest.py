"""Settings of this tier's own process; the ranks set theirs in harness.py."""

import torch

torch.set_num_threads(1)  # the references are tiny: more threads only wait for each other
