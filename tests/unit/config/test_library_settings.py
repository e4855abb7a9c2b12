"""What a run hands on to SGLang and Megatron-Core: settable, recorded, and never a second value of a setting."""

from pathlib import Path
from typing import get_origin

import pytest

from minpro_megatron.config.library_settings import DICTIONARIES, owners
from minpro_megatron.config.listing import fields_of
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.report.settings import described
from tests.support.run_examples import example_config

ENTRIES = {
    "server.arguments.chunked_prefill_size=2048": ("server", "arguments", {"chunked_prefill_size": 2048}),
    "server.arguments.kv_cache_dtype=fp8_e4m3": ("server", "arguments", {"kv_cache_dtype": "fp8_e4m3"}),
    "model.megatron.apply_rope_fusion=false": ("model", "megatron", {"apply_rope_fusion": False}),
    "optimizer.megatron.pin_cpu_grads=false": ("optimizer", "megatron", {"pin_cpu_grads": False}),
    "parallel.ddp.bucket_size=1000": ("parallel", "ddp", {"bucket_size": 1000}),
}


@pytest.mark.parametrize("assignment", ENTRIES)
def test_an_entry_is_set_on_the_command_line_recorded_and_reported(assignment: str, tmp_path: Path) -> None:
    section, key, expected = ENTRIES[assignment]
    changed = with_overrides(example_config(tmp_path), [assignment])
    assert getattr(getattr(changed, section), key) == expected
    read = RunConfig.from_json(changed.to_json())
    assert read == changed
    (shown,) = [one for one in described(read.model_dump(mode="json"))[section] if one.name in assignment]
    assert shown.is_changed
    assert "this project" in shown.description or "Further" in shown.description


def test_entries_are_added_replaced_and_removed(tmp_path: Path) -> None:
    assignments = ["server.arguments.stream_interval=1", "server.arguments.stream_interval=2"]
    config = with_overrides(example_config(tmp_path), [*assignments, "server.arguments.watchdog_timeout=9"])
    assert config.server.arguments == {"stream_interval": 2, "watchdog_timeout": 9}
    assert with_overrides(config, ["server.arguments={}"]).server.arguments == {}


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("server.arguments.tp_size=4", "tp_size is decided by server.tensor_parallel: remove it, and set server.tens"),
        ("server.arguments.weight_version=4", "weight_version cannot be set: the run numbers the versions"),
        ("model.megatron.recompute_granularity=full", "recompute_granularity is decided by model.recompute"),
        ("optimizer.megatron.lr=1", "lr is decided by optimizer.learning_rate"),
        ("parallel.ddp.grad_reduce_in_fp32=false", "grad_reduce_in_fp32 cannot be set: checkpoints and planner"),
        ("server.expert_parallel=2", "expert_parallel = 2 must be 1 or tensor_parallel = 1"),
        ("parallel.dispatcher=flex", "expert x expert_tensor = 1: raise expert"),
        ("model.attention_backend=flash", "model.attention_backend = flash selects kernels of Transformer Engine"),
    ],
)
def test_what_another_setting_decides_is_refused(assignment: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        with_overrides(example_config(tmp_path), [assignment])


def test_options_are_for_the_servers_that_a_run_starts(tmp_path: Path) -> None:
    given = ["server.arguments.stream_interval=1"]
    with pytest.raises(ValueError, match=r"arguments is for the SGLang servers .* engine = reference; remove it"):
        with_overrides(example_config(tmp_path), [*given, "server.engine=reference"])
    with pytest.raises(ValueError, match=r"arguments is for .* servers at urls are not started by the run"):
        with_overrides(example_config(tmp_path), [*given, 'server.urls=["http://a:1"]'])


def test_every_dictionary_is_a_setting_and_every_owner_one_too() -> None:
    settings = dict(fields_of(RunConfig))
    for dictionary in DICTIONARIES:
        assert get_origin(settings[dictionary].annotation) is dict
        assert {owner for owner in owners(dictionary).values() if " " not in owner} <= settings.keys()
