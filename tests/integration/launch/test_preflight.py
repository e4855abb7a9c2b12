"""Preflight names each problem, all at once, with field, value and remedy; a good run has none."""

import json
import os
import re
import socket
import sqlite3
from contextlib import closing

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.preflight import run_checks as preflight
from minpro_megatron.launch.preflight.run_checks import problems, warnings
from minpro_megatron.launch.preflight.shared_memory_check import shared_memory_problems
from minpro_megatron.launch.run_folder import claimed
from minpro_megatron.launch.starts import begin_start
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.planning.memory import shared_bucket_bytes
from minpro_megatron.planning.routes import route_file_bytes
from minpro_megatron.planning.workload import Workload, batch_of
from tests.support.run_examples import PROMPT, example_config, write_example_files
from tests.support.small_disk import fill, small_disk


@pytest.fixture
def folder(tmp_path):
    write_example_files(tmp_path)
    return tmp_path


def only_problem(config) -> str:
    (problem,) = problems(config)
    return problem


def test_a_good_run_has_no_problem(folder):
    assert problems(example_config(folder)) == []


@pytest.mark.parametrize(
    ("missing", "pattern"),
    [
        ("hf/config.json", r"^model.hf_path = .*/hf: config.json is missing; give"),
        ("hf/tokenizer.json", r"^model.hf_path = .*/hf: the tokenizer is missing; copy tokenizer.json"),
        ("hf/model.safetensors", r"^model.hf_path = .*/hf: no \*.safetensors file; .*download"),
        ("megatron/manifest.json", r"^model.megatron_path = .*/megatron: manifest.json is missing; run `minpro conv"),
        ("train.jsonl", r"^data.train_file = .*train.jsonl: there is no such file; give"),
        ("heldout.jsonl", r"^data.heldout_file = .*heldout.jsonl: there is no such file; give"),
    ],
)
def test_a_missing_file_is_named(folder, missing, pattern):
    (folder / missing).unlink()
    assert re.search(pattern, only_problem(example_config(folder)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"sampling": {"max_prompt_tokens": 3, "max_response_tokens": 8}},
            "data.train_file: no prompt has 1 .. sampling.max_prompt_tokens = 3 tokens; raise it",
        ),
        (
            {"sampling": {"max_prompt_tokens": 16, "max_response_tokens": 489}, "batch": {"max_tokens_per_row": 512}},
            "sampling.max_prompt_tokens + sampling.max_response_tokens + 8 = 513 exceeds the model's "
            "max_position_embeddings = 512; lower one of them",
        ),
        (
            {"staleness": {"delay_steps": 5}},
            "staleness.delay_steps = 5: the run has num_global_steps = 4, so every step would train on rollouts of "
            "the initial weights; lower the delay, or raise num_global_steps",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_a_role_starts(folder, changes, problem):
    (folder / "heldout.jsonl").write_text(PROMPT.replace("1+1=", "2="))
    assert only_problem(example_config(folder, **changes)) == problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=sft", "data.demonstrations={folder}/sft.jsonl", "batch.responses_per_prompt=1"],
        ["debug.journal={folder}/other"],
        ['server.urls=["http://127.0.0.1:1"]', "server.first_port=0"],
    ],
    ids=["demonstrations", "journal", "external servers"],
)
def test_trained_sequences_must_fit_the_model_without_own_servers_too(folder, overrides):
    (folder / "sft.jsonl").write_text('{"id": "1", "prompt": "1+1=", "response": "2"}\n')
    changes = ["staleness.delay_steps=0", *(override.format(folder=folder) for override in overrides)]
    longest = with_overrides(
        example_config(folder), [*changes, "batch.max_tokens_per_row=1024", "sampling.max_response_tokens=496"]
    )
    refusal = "sampling.max_prompt_tokens + sampling.max_response_tokens = 513 exceeds the model's max_position"
    assert not [line for line in problems(longest) if "max_position_embeddings" in line]
    found = problems(with_overrides(longest, ["sampling.max_response_tokens=497"]))
    assert [line[: len(refusal)] for line in found if "max_position_embeddings" in line] == [refusal]


def test_a_damaged_tokenizer_is_found(folder):
    (folder / "hf" / "tokenizer.json").write_text("{}")
    assert re.search(r"^model.hf_path = .*/hf: .*tokenizer.json: not a tokenizer", only_problem(example_config(folder)))


def test_a_conversion_of_older_weights_is_refused(folder):
    converted = (folder / "megatron" / "manifest.json").stat().st_mtime
    os.utime(folder / "hf" / "model.safetensors", (converted + 10, converted + 10))
    assert re.search("^model.megatron_path = .*: older than the weights in", only_problem(example_config(folder)))


def test_a_shard_that_the_index_names_must_be_there(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files missing, such as model-2.safetensors" in only_problem(example_config(folder))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "data.train_file = {path}: the file is empty"),
        ("1+1=2\n", "{path}, line 1: Expected `object`, got `int`"),
        ("3\n", "{path}, line 1: Expected `object`, got `int`"),
        (
            PROMPT.replace("answer", "solution"),
            "{path}, line 1: Object missing required field `answer`; the row has the",
        ),
        (
            "[1]\n",
            "data.train_file = '{path}': it is a JSON array, but a prompt file is JSON Lines; make a prompt file of it",
        ),
        ("[" * 10**5 + "\n", "data.train_file = '{path}': it is a JSON array"),
        ('{"x": ' + "[" * 10**5 + "\n", "{path}, line 1: it is nested too deeply; correct the row or remove it"),
    ],
)
def test_the_data_must_hold_prompts(folder, content, rule):
    (folder / "train.jsonl").write_text(content)
    problem = only_problem(example_config(folder))
    assert problem.startswith(rule.format(path=folder / "train.jsonl"))


def test_prompts_that_are_trained_on_and_evaluated_are_counted(folder):
    rows = [{"id": str(place), "source": "s", "prompt": f"{place} + {place} =", "answer": "0"} for place in range(5)]
    others = [row | {"prompt": f" {row['prompt']}\n"} if row["id"] < "3" else row | {"prompt": "?"} for row in rows]
    for name, content in (("train", rows), ("heldout", others), ("bench", [row | {"prompt": "!"} for row in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    benchmarks = [{"name": name, "file": str(folder / f"{name}.jsonl")} for name in ("bench", "train")]
    evaluation = {"num_prompts": 4, "benchmarks": benchmarks}
    told = warnings(example_config(folder, evaluation=evaluation))
    assert [line.split(": ")[0] for line in told] == [
        f"data.heldout_file = {folder}/heldout.jsonl",
        f"evaluation.benchmarks train, file {folder}/train.jsonl",
    ]
    assert f"3 of its 4 prompts are also in data.train_file = {folder}/train.jsonl: scores" in told[0]
    assert "5 of its 5 prompts are also in" in told[1]
    (folder / "train.jsonl").write_text(json.dumps(rows[4] | {"prompt": "$"}) + "\n")
    assert warnings(example_config(folder)) == []


@pytest.mark.parametrize(
    ("server", "is_told"),
    [
        ({"urls": ["http://127.0.0.1:1", "http://10.0.0.7:30000"]}, True),
        ({"urls": ["http://10.0.0.7:30000"], "api_key_variable": "KEY"}, False),
        ({"urls": ["http://localhost:1", "http://[::1]:2"]}, False),
        ({"host": "0.0.0.0"}, False),  # the run makes a key for its own
    ],
)
def test_servers_of_others_that_ask_for_no_key_are_warned_of(folder, server, is_told):
    told = warnings(with_overrides(example_config(folder), [f"server.{k}={json.dumps(v)}" for k, v in server.items()]))
    assert len(told) == is_told
    if is_told:
        assert told[0].startswith(
            "server.urls: 10.0.0.7 without an API key: anyone with access to such a server's port"
        )


@pytest.mark.parametrize(
    ("modules", "backend", "is_told"),
    [
        ("core_attn", "auto", True),
        ("moe_act+core_attn", "transformer_engine", True),
        ("moe_act", "auto", False),
        ("core_attn", "torch", False),
    ],
)
def test_recomputation_that_saves_nothing_is_warned_of(folder, modules, backend, is_told):
    changes = ["device=cuda", "model.dtype=bfloat16", f"model.backend={backend}", "model.recompute=selective"]
    told = warnings(with_overrides(example_config(folder), [*changes, f"model.recompute_modules={modules}"]))
    assert [line.split(" computes")[0] for line in told] == ["model.recompute_modules: core_attn"] * is_told


ROWS = [
    {"id": "1", "source": "a", "prompt": "1+1=", "answer": "2", "pass_rate": 0.5},
    {"id": "2", "source": "b", "prompt": "1+2=", "answer": "3"},
]


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        (
            {"source_weights": {"a": 1, "c": 1}},
            r"^data.source_weights: 'c' is not a source of data.train_file = .* a, b$",
        ),
        ({"min_pass_rate": 0.9}, r"^data.min_pass_rate = 0.9, data.max_pass_rate = 1: none of the 2 prompts"),
        ({"chat_template": True}, r"^data.chat_template = true: neither .*/hf/tokenizer_config.json nor"),
    ],
)
def test_prompts_that_the_settings_do_not_find_are_named(folder, setting, pattern):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "hf" / "tokenizer_config.json").write_text("{}")
    config = example_config(folder)
    assert re.search(pattern, only_problem(config.model_copy(update={"data": config.data.model_copy(update=setting)})))


def test_a_damaged_row_and_too_few_held_out_ones_are_both_named(folder):
    (folder / "train.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"id": "2"}\n')
    both = problems(example_config(folder, evaluation={"num_prompts": 2}))
    assert re.search(r"train.jsonl, line 2: Object missing required field", both[0])
    assert re.search(r"^evaluation.num_prompts = 2: data.heldout_file = .* has only 1 rows; lower", both[1])
    assert len(both) == 2


def test_a_broken_template_is_named(folder):
    (folder / "hf" / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    config = example_config(folder)
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": True})})
    assert re.search(
        r"^data.chat_template = true: the template in .*tokenizer_config.json failed", only_problem(config)
    )


def make_journal(config, *, groups: int) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(config.run_dir / "journal.sqlite")) as journal:
        journal.execute("CREATE TABLE groups (group_id INTEGER)")
        journal.executemany("INSERT INTO groups VALUES (?)", [(group,) for group in range(groups)])
        journal.commit()


def test_a_folder_with_the_rollouts_of_another_run_is_not_overwritten(folder):
    config = example_config(folder)
    make_journal(config, groups=1)
    assert "holds a run of unknown settings" in only_problem(config)
    (config.run_dir / "run.json").write_text(config.model_copy(update={"seed": 5}).to_json())
    assert re.search(
        r"^name = example: .*runs/example holds a run with other settings \(seed: 5 -> 0\)", only_problem(config)
    )


def test_a_run_with_the_same_settings_goes_on(folder):
    config = example_config(folder)
    make_journal(config, groups=1)
    (config.run_dir / "run.json").write_text(config.to_json())
    assert problems(config) == []


def test_a_damaged_journal_is_not_overwritten_either(folder):
    config = example_config(folder)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "journal.sqlite").write_text("this is no database, but somebody may still want it")
    assert "holds a run of unknown settings" in only_problem(config)


def test_a_run_that_failed_before_its_first_rollout_may_start_again(folder):
    config = example_config(folder)
    make_journal(config, groups=0)
    (config.run_dir / "run.json").write_text(config.to_json())
    assert problems(config) == []


@pytest.mark.parametrize(
    "entry",
    ["checkpoints/global_step_10/actor/model.pt", "tensorboard/events.out.tfevents.1", "logs/train.log", "wandb/run",
     "model.safetensors", "metrics.jsonl", "hf_export/config.json", ".git/HEAD", "journal.sqlite-wal"],
)  # fmt: skip
def test_a_folder_of_another_program_is_refused(folder, entry):
    config = example_config(folder)
    path = config.run_dir / entry
    path.parent.mkdir(parents=True)
    path.write_text("" if entry == "metrics.jsonl" else "precious")
    assert f"it contains files that no run of this program wrote ({entry.partition('/')[0]});" in only_problem(config)
    assert path.exists()


def test_a_run_json_of_another_program_does_not_make_the_folder_ours(folder):
    config = example_config(folder)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "run.json").write_text('{"name": "example", "lr": 0.1}')
    assert "it contains files that no run of this program wrote (run.json)" in only_problem(config)


def test_checkpoints_in_the_folder_of_a_start_that_failed_are_kept(folder):
    config = example_config(folder)
    (config.run_dir / "checkpoints" / "global_step_10").mkdir(parents=True)
    (config.run_dir / "run.json").write_text(config.to_json())
    assert "it contains files that no run of this program wrote (checkpoints)" in only_problem(config)


def test_what_a_start_makes_before_its_settings_is_no_obstacle(folder):
    config = example_config(folder)
    begin_start(config.run_dir)
    with claimed(config.run_dir):
        assert problems(config) == []
    assert problems(config) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_text_files_of_a_model_that_are_no_files_are_refused(folder, kind):
    path = folder / "hf" / "notes.json"
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    expected = "this is a symbolic link to /etc/hostname" if kind == "link" else "this is not a regular file"
    assert f"model.hf_path = {folder / 'hf'}: {path}: {expected}" in only_problem(example_config(folder))


def test_ports_in_use_are_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = {"device": "cpu", "dtype": "float32", "first_port": port}
        config = example_config(folder, server=server, collector={"port": port})
        both = problems(config)
    assert re.search(rf"^collector.port = {port}: a server uses it; choose", both[0])
    assert re.search(rf"^server.first_port = {port}: cannot listen on 127.0.0.1:{port} \(.*in use\)", both[1])
    assert problems(config.model_copy(update={"collector": config.collector.model_copy(update={"port": 0})})) == []


def test_ports_end_at_65535(folder):
    server = {"device": "cpu", "dtype": "float32", "first_port": 65535, "count": 2}
    assert "ports end at 65535" in only_problem(example_config(folder, server=server))


@pytest.mark.parametrize(
    ("present", "pattern"),
    [
        (0, r"^device and server.device = cuda: no usable NVIDIA GPU .*set device=cpu server.device=cpu$"),
        (2, r"^parallel's world size 2 and .*tensor_parallel 1, with .*disaggregated, need 3 GPUs: 2 visible"),
        (3, None),
    ],
)
def test_gpus_must_be_there(folder, monkeypatch, present, pattern):
    monkeypatch.setattr(preflight, "count_gpus", lambda: present)
    config = example_config(folder, device="cuda", server={"device": "cuda"}, parallel={"tensor": 2})
    found = problems(config)
    assert [bool(re.search(str(pattern), problem)) for problem in found] == ([True] if pattern else [])


def test_buckets_must_fit_into_shared_memory(folder):
    config = with_overrides(example_config(folder), ["publish.transport=shared_memory"])
    assert problems(config) == []
    with small_disk(folder / "shm") as disk:
        needed = shared_bucket_bytes(config, read_architecture(config.model.hf_path))
        fill(disk, leave=needed // 4096 * 4096 + 4096)
        assert list(shared_memory_problems(config, disk)) == []
        fill(disk)
        [line] = shared_memory_problems(config, disk)
    assert re.search(r"^publish.transport = shared_memory .*two buckets are .*has 0.0 kB free: .*--shm-size", line)
    assert list(shared_memory_problems(example_config(folder), disk)) == []


def test_memory_is_not_shared_with_servers_of_others(folder):
    with pytest.raises(ValueError, match=r"publish.transport = shared_memory with server.urls: .* set it to broadcast"):
        with_overrides(example_config(folder), ["publish.transport=shared_memory", 'server.urls=["http://a:1"]'])


def test_disk_space_must_do(folder, monkeypatch):
    monkeypatch.setattr(preflight, "_SPARE_BYTES", 10**18)
    assert re.search(r"^runs_dir = .* GB free, about 1000000000.0 GB needed; ", only_problem(example_config(folder)))


@pytest.mark.parametrize("saves", [["every_minutes=30"], ["at_end=true"], ["every_steps=5"]])
def test_checkpoints_count_as_disk_space_whatever_asks_for_them(folder, monkeypatch, saves):
    monkeypatch.setattr(preflight, "_SPARE_BYTES", 10**15)
    (folder / "hf" / "model.safetensors").write_bytes(bytes(10**8))
    os.utime(folder / "hf" / "model.safetensors", (0, 0))
    none = ["checkpoint.every_steps=0", "checkpoint.every_minutes=0", "checkpoint.at_end=false"]
    config = with_overrides(example_config(folder), none)
    problems_found = [
        only_problem(settings)
        for settings in (config, with_overrides(config, [f"checkpoint.{save}" for save in saves]))
    ]
    needed = [float(problem.partition("about ")[2].partition(" GB")[0]) for problem in problems_found]
    # weights, float32 weights and two moments, of the last two, the best one and the one being written
    assert needed[1] - needed[0] == pytest.approx(4 * 4 * 0.1)


def test_routes_of_the_servers_count_as_disk_space(folder, monkeypatch):
    monkeypatch.setattr(preflight, "_SPARE_BYTES", 10**18)
    config = with_overrides(example_config(folder), ["model.routing_replay=rollout"])
    architecture, tokens = read_architecture(config.model.hf_path), batch_of(config, Workload.of(config)).tokens
    size = route_file_bytes(config, architecture, tokens)
    assert size > 0
    assert f"GB needed, {size / 1e9:.1f} GB of it for the servers' routes (model.routing" in only_problem(config)
    kept = with_overrides(example_config(folder), ["sampling.top_k=20"])
    assert re.search(r"GB needed, [0-9.]+ GB of it for kept ids \(sampling.top_k = 20\)", only_problem(kept))


def test_all_problems_come_at_once(tmp_path):
    fields = [problem.split(" = ")[0] for problem in problems(example_config(tmp_path))]
    assert fields == ["model.hf_path", "model.megatron_path", "data.train_file", "data.heldout_file"]


@pytest.mark.parametrize("hf_path", ["Qwen/Qwen3-8B-Base", "/nowhere/model"])
def test_a_model_that_is_no_folder_here_is_refused(folder, hf_path):
    model = example_config(folder).model.model_copy(update={"hf_path": hf_path})
    assert re.search(
        rf"^model.hf_path = {hf_path}: no such folder; give .* downloaded first",
        only_problem(example_config(folder, model=model)),
    )


@pytest.mark.parametrize(
    ("parallel", "pattern"),
    [
        ({"expert": 3}, r"^parallel.expert = 3 must divide the model's num_experts = 8$"),
        ({"tensor": 8}, r"^parallel.tensor = 8 must divide the model's num_attention_heads = 4$"),
        (
            {"pipeline": 3},
            r"^parallel.pipeline x virtual_pipeline = 3 must divide the model's layers = 2; lower pipeline or ",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_named_before_any_rank_starts(folder, parallel, pattern):
    assert re.search(pattern, only_problem(example_config(folder, parallel=parallel)))
