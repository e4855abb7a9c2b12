"""The planner's count of SGLang's prefill graphs, compared with SGLang."""

import pytest

from minpro_megatron.planning.server_share import prefill_graphs


def test_prefill_graphs_are_those_of_sglang() -> None:
    hook = pytest.importorskip("sglang.srt.arg_groups.cuda_graph_hook")
    for tokens in (2048, 4096, 8192, 16384):
        assert prefill_graphs(tokens) == len(hook.generate_prefill_cuda_graph_batch_sizes(tokens))
