"""TensorBoard's dashboard, hyperparameters, memory and throughput: what they are made of."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from minpro_megatron.actor.flops import PEAK_BFLOAT16_FLOPS, peak_flops
from minpro_megatron.config.run import with_overrides
from minpro_megatron.metrics.declared import METRICS, check_declared
from minpro_megatron.monitor.dashboard import HEADLINES, LAYOUT, hyperparameters
from minpro_megatron.monitor.memory import FOLDER, MemoryStatement, host_bytes, stated_host_bytes
from minpro_megatron.monitor.tensorboard_board import board_folder
from minpro_megatron.monitor.throughput import TrainerCompute
from minpro_megatron.monitor.writer import RunWriter
from tests.support.batches import make_batch
from tests.support.run_examples import example_config

LAYOUTS: Any = layout_pb2  # made at import: no type checker knows their classes
SETTINGS: Any = plugin_data_pb2
NAMES = [re.sub("<.*", "1", name) for name in METRICS]  # a bucket of each family


def test_the_groups_are_those_a_run_is_judged_by() -> None:
    groups = ["reward", "off-policyness", "objective", "optimisation", "throughput", "fleet", "memory"]
    assert list(LAYOUT) == groups


@pytest.mark.parametrize(
    "pattern", [name for charts in LAYOUT.values() for _, names in charts.values() for name in names]
)
def test_every_line_of_a_chart_is_a_metric(pattern: str) -> None:
    assert any(re.match(pattern, name) for name in NAMES)


def test_the_headlines_are_metrics() -> None:
    check_declared(HEADLINES)
    assert set(HEADLINES) <= set(METRICS)


def test_tensorboard_reads_layout_and_settings(tmp_path: Path) -> None:
    config = with_overrides(example_config(tmp_path), ["optimizer.learning_rate=2e-6", "batch.packing=false"])
    with RunWriter(config.run_dir) as writer:
        writer.describe(hyperparameters(config))
    board = EventAccumulator(str(board_folder(config.run_dir))).Reload()
    text = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = LAYOUTS.Layout.FromString(text)
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert layout.category[0].chart[0].multiline.tag[0] == "reward/accuracy$"
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = SETTINGS.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["optimizer.learning_rate"].number_value == 2e-6
    assert found["batch.packing"].string_value == "false"
    assert found["objective.name"].string_value == "minpro"
    assert found["seed"].number_value == 0
    assert not any(name.startswith(("server.", "alarms.", "loss.")) for name in found)
    assert "optimizer.beta1" not in found


def test_hyperparameters_are_what_differs_from_the_defaults(tmp_path: Path) -> None:
    config = example_config(tmp_path)
    changes = ["objective.name=gspo", "objective.clip_high=0.1", "loss.kl.enabled=true", "sampling.temperature=1.0"]
    base, changed = hyperparameters(config), hyperparameters(with_overrides(config, changes))
    assert "sampling.temperature" not in changed
    assert changed == base | {"objective.name": "gspo", "objective.clip_high": 0.1, "loss.kl.enabled": "true"}


def test_roles_state_their_memory_and_shares_of_a_role_add_up(tmp_path: Path) -> None:
    assert stated_host_bytes(tmp_path) == {}
    MemoryStatement(tmp_path, "collect").tick()
    (stated,) = stated_host_bytes(tmp_path).items()
    assert stated[0] == "memory/host_bytes/collect"
    assert stated[1] == pytest.approx(host_bytes(), rel=0.2)
    assert stated[1] > 20e6  # an interpreter with numpy
    for name, content in (
        ("serve-0@a", {"host_bytes": 1000}), ("serve-4@b", {"host_bytes": 234}), ("serve-8@c", {}), ("serve-9@d", None),
    ):  # fmt: skip
        (tmp_path / FOLDER / f"{name}.json").write_text("half" if content is None else json.dumps(content))
    assert stated_host_bytes(tmp_path)["memory/host_bytes/serve"] == 1234
    check_declared(stated_host_bytes(tmp_path))


def test_memory_is_stated_now_and_then(tmp_path: Path) -> None:
    statement = MemoryStatement(tmp_path, "serve")
    statement.tick()
    (path,) = (tmp_path / FOLDER).iterdir()
    path.unlink()
    statement.tick()
    assert not path.exists()


def test_throughput_is_that_of_one_gpu() -> None:
    # 3 groups of 2 responses: prompts of 3, 1 and 6 tokens, responses of 7, 5 and 6 tokens together
    batch = make_batch()
    lengths = [3 + 5, 3 + 2, 1 + 1, 1 + 4, 6 + 3, 6 + 3]
    compute = TrainerCompute(lambda tokens: 1e12 * tokens**2, num_ranks=4, peak_flops=2e12)
    rates = compute.rates(batch, train_s=5.0)
    flops_per_s = 1e12 * sum(length**2 for length in lengths) / 5 / 4
    assert rates == pytest.approx(
        {
            "throughput/trained_tokens_per_s_per_gpu": sum(lengths) / 5 / 4,
            "throughput/tflops_per_gpu": flops_per_s / 1e12,
            "throughput/mfu": flops_per_s / 2e12,
        }
    )
    assert "throughput/mfu" not in TrainerCompute(float, 4, None).rates(batch, 5.0)
    check_declared(rates)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A1000", None),
        ("", None),
    ],
)
def test_the_peak_is_found_by_the_name_that_cuda_gives(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None


def test_every_gpu_in_the_table_can_be_found() -> None:
    for name, peak in PEAK_BFLOAT16_FLOPS.items():
        assert peak_flops(f"NVIDIA {name}", "bfloat16") == peak
