"""The options of the command `eval`: validated and converted to settings of servers, sampling and grading."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minpro_megatron.config.options import SettingOption, given_settings, naming, nested
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.benchmarks import (
    MAX_RESPONSE_TOKENS,
    SAMPLES_PER_REQUEST,
    TEMPERATURE,
    TOP_P,
    samples_of,
)
from minpro_megatron.launch.preflight.gpu_count import count_gpus

SERVERS_FOLDER = "servers"
HELDOUT = "heldout"  # the name of a run's held-out prompts among the benchmarks of --run

# By the title of their group in the help. The defaults are the protocol of arXiv:2601.22718.
SETTING_OPTIONS: dict[str, tuple[SettingOption, ...]] = {
    "wording and sampling": (
        SettingOption("--instruction", "data.instruction", "TEXT", "dapo"),
        SettingOption("--chat-template", "data.chat_template"),
        SettingOption("--chat-template-arguments", "data.chat_template_arguments", "JSON"),
        SettingOption("--extra-stop-tokens", "sampling.extra_stop_tokens", "TOKEN,..."),
        SettingOption("--max-prompt-tokens", "sampling.max_prompt_tokens", "N"),
        SettingOption("--max-response-tokens", "sampling.max_response_tokens", "N", MAX_RESPONSE_TOKENS),
        SettingOption("--temperature", "evaluation.temperature", "X", TEMPERATURE),
        SettingOption("--top-p", "evaluation.top_p", "X", TOP_P),
        SettingOption("--environment", "environment.name", "NAME"),
        SettingOption("--max-turns", "sampling.max_turns", "N"),
        SettingOption("--seed", "seed", "N"),
    ),
    "grading": (
        SettingOption("--reward", "reward.function", "NAME", "math"),
        SettingOption("--right-reward", "reward.right_reward", "X"),
        SettingOption("--reward-workers", "reward.workers", "N"),
        SettingOption("--reward-timeout-s", "reward.timeout_s", "X"),
        SettingOption("--reward-urls", "reward.urls", "URL,..."),
        SettingOption("--reward-concurrency", "reward.concurrency", "N"),
        SettingOption("--reward-attempt-timeout-s", "reward.attempt_timeout_s", "X"),
        SettingOption("--reward-deadline-s", "reward.deadline_s", "X"),
    ),
    "servers": (
        SettingOption("--urls", "server.urls", "URL,..."),
        SettingOption("--api-key-variable", "server.api_key_variable", "NAME"),
        SettingOption("--engine", "server.engine"),
        SettingOption("--device", "server.device", default_text="cuda if there is a GPU"),
        SettingOption("--dtype", "server.dtype", default_text="float32 on the CPU, else bfloat16"),
        SettingOption("--servers", "server.count", "N"),
        SettingOption("--tensor-parallel", "server.tensor_parallel", "N"),
        SettingOption("--max-running-requests", "server.max_running_requests", "N"),
        SettingOption("--start-timeout-s", "server.start_timeout_s", "X"),
        SettingOption("--request-timeout-s", "server.request_timeout_s", "X", 7200.0),
    ),
}
ALL_OPTIONS = [option for options in SETTING_OPTIONS.values() for option in options]
# The same options for the commands that sample the prompts of a run's own file: those have no instruction unless the
# run has one, and every token may be sampled, as in training.
_OWN_DEFAULTS: Mapping[str, Any] = {"data.instruction": "none", "evaluation.top_p": 1.0}
OWN_PROMPTS_OPTIONS = {
    title: [replace(option, default=_OWN_DEFAULTS.get(option.setting, option.default)) for option in group]
    for title, group in SETTING_OPTIONS.items()
}


def own_prompts_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """By `section.key`, the values of OWN_PROMPTS_OPTIONS: those given on the command line, else the defaults."""
    every = [option for group in OWN_PROMPTS_OPTIONS.values() for option in group]
    return {option.setting: option.value for option in every if option.value is not None} | given_settings(every, given)


def without_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command line that are not settings."""
    settings = {option.destination for option in ALL_OPTIONS}
    return {name: value for name, value in given.items() if name not in settings}


# What messages about the settings of an evaluation are to be named.
FLAGS = {option.setting: option.flag for option in ALL_OPTIONS} | {"model.hf_path": "--model"}
# What an evaluation with --run takes from the run's settings: the wording, the limits and the reward.
OF_RUN = [
    *(option.setting for option in SETTING_OPTIONS["wording and sampling"] if option.setting != "seed"),
    *(option.setting for option in SETTING_OPTIONS["grading"]),
]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What an evaluation is asked for. `settings`: by `section.key`, the values of the options that are given."""

    model: str
    benchmarks: Sequence[str]
    output: Path
    data: Path = Path("data")
    benchmark_files: Mapping[str, Path] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)  # by benchmark; "" for all others
    num_prompts: int | None = None
    compare: Sequence[Path] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: RunConfig | None = None  # the run whose wording, limits and reward are used


def of_run(run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options `given`, and for those that are missing the run's: its exported weights, its held-out prompts and
    benchmarks, and their numbers of samples. Raises UserError if the run has no exported weights."""
    files = {HELDOUT: Path(run.data.heldout_file)}
    files |= {benchmark.name: Path(benchmark.file) for benchmark in run.evaluation.benchmarks}
    samples = {HELDOUT: run.evaluation.samples_per_prompt}
    samples |= {benchmark.name: benchmark.samples_per_prompt for benchmark in run.evaluation.benchmarks}
    result = {"benchmarks": list(files), **given, "run": run}
    result["benchmark_files"] = files | dict(given.get("benchmark_files", {}))
    own = dict(given.get("samples", {}))
    if "" not in own:
        own = {name: count for name, count in samples.items() if name in result["benchmarks"]} | own
    result["samples"] = own
    if "model" not in given:
        weights = run.run_dir / "hf_export"
        if not (weights / "config.json").is_file():
            raise UserError(
                f"--run {run.run_dir}: there are no exported weights in {weights} yet; give --model, such as a folder "
                f"in {run.run_dir / 'checkpoints'}"
            )
        result["model"] = str(weights)
    return result


def run_config(options: EvaluationOptions) -> RunConfig:
    """The settings of serve, clients and graders; their run folder is OUTPUT/servers. Raises UserError."""
    chosen = {option.setting: option.value for option in ALL_OPTIONS}
    by_source = {"calculator": "calculator"}
    if options.run is not None:
        values = options.run.model_dump()
        for setting in OF_RUN:
            section, _, key = setting.partition(".")
            chosen[setting] = values[section][key]
        by_source |= options.run.reward.by_source
        chosen |= {f"environment.{key}": value for key, value in values["environment"].items()}
    chosen |= options.settings
    if chosen["server.device"] is None:
        chosen["server.device"] = "cuda" if chosen["server.engine"] == "sglang" and count_gpus() else "cpu"
    if chosen["server.dtype"] is None:
        chosen["server.dtype"] = "bfloat16" if chosen["server.device"] == "cuda" else "float32"
    limits = [chosen[f"sampling.max_{part}_tokens"] for part in ("prompt", "response")]
    fixed = {
        "name": SERVERS_FOLDER,
        "runs_dir": str(options.output),
        # there is no trainer, so settings that only the trainer reads have no effect
        "device": "cpu",
        "model.hf_path": options.model,
        "model.megatron_path": "",
        "model.dtype": "float32",
        "data.train_file": "",
        "data.heldout_file": "",
        "batch.responses_per_prompt": SAMPLES_PER_REQUEST,
        "batch.max_tokens_per_row": max(1, sum(limits)),
        "reward.by_source": by_source,
    }
    return parse_run_config(nested(fixed | chosen))


def wording(options: EvaluationOptions, config: RunConfig) -> str:
    """One line: how questions are presented, sampled and graded, and where that comes from."""
    data, sampling, evaluation = config.data, config.sampling, config.evaluation
    template = "with the model's chat template" if data.chat_template else "without a chat template"
    turns = ""
    if config.environment.enabled:
        turns = f"; environment {config.environment.name}, at most {sampling.max_turns} turns"
    arguments = f" {data.chat_template_arguments}" if data.chat_template_arguments else ""
    origin = f"; from {options.run.run_dir}/run.json unless given" if options.run is not None else ""
    return (
        f"wording: instruction {data.instruction!r}, {template}{arguments}; at most {sampling.max_prompt_tokens} "
        f"prompt and {sampling.max_response_tokens} response tokens; temperature {evaluation.temperature:g}, top-p "
        f"{evaluation.top_p:g}{turns}; reward {config.reward.function}{origin}"
    )


def naming_flags() -> AbstractContextManager[None]:
    """Errors that are raised inside name the options of the command line in place of the settings of a run."""
    return naming(FLAGS)


def samples_per_prompt(options: EvaluationOptions) -> dict[str, int]:
    """The samples per prompt of each benchmark: its own number, else the number given for all, else the paper's."""
    if unknown := options.samples.keys() - {*options.benchmarks, ""}:
        raise UserError(f"--samples {sorted(unknown)[0]}=...: it is not among --benchmarks")
    rest = options.samples.get("")
    return {name: options.samples.get(name, rest or samples_of(name)) for name in options.benchmarks}
