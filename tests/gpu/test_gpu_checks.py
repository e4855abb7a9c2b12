"""Every check of `minpro gpu-check` at full size on a GPU, each in its own process. Skipped where there is none."""

import pytest
import torch

from minpro_megatron.gpu_checks.registry import CHECKS, Check
from minpro_megatron.gpu_checks.runner import run_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.long,  # minutes, where there is a GPU
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_check_passes(check: Check) -> None:
    (result,) = run_checks([check], "cuda", False, check.limit_s, lambda result: None, lambda line: None)
    print(result.as_line())
    if result.verdict == "skipped":
        pytest.skip(result.problems[0])
    assert result.verdict == "passed", "\n".join(result.problems)
