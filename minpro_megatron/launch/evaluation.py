"""The command `eval`: benchmarks -> servers -> samples -> scores, tables and a chart."""

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.markdown import Markdown

from minpro_megatron.command_line import make_console
from minpro_megatron.config.options import with_flags
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, SUCCEEDED, TERMINATED, ProjectError, UserError, report, report_unexpected
from minpro_megatron.evaluation.benchmarks import title_of
from minpro_megatron.evaluation.samples import SampledGroup, SampleFile, text_to_compare
from minpro_megatron.evaluation.scores import Scores, score_all
from minpro_megatron.evaluation.tables import markdown, scalars
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.fleet.open_files import raise_file_limit
from minpro_megatron.launch.evaluation_model import with_hf_model
from minpro_megatron.launch.evaluation_options import (
    FLAGS,
    EvaluationOptions,
    naming_flags,
    run_config,
    samples_per_prompt,
    wording,
)
from minpro_megatron.launch.evaluation_prompts import read_benchmarks, sampling_settings
from minpro_megatron.launch.preflight.reward_check import grader_problems
from minpro_megatron.monitor.logs import explanation
from minpro_megatron.monitor.sampling_progress import SamplingProgress
from minpro_megatron.monitor.status import read_statuses
from minpro_megatron.report.pass_at_k_chart import Curve, pass_at_k_png
from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.roles.evaluate import EvaluationError, Sampler, Task, plan
from minpro_megatron.serving.api_key import given_api_key, make_api_key
from minpro_megatron.serving.server_command import context_length
from minpro_megatron.serving.watched_server import external_urls

RESULTS_FILE, TABLE_FILE, PICTURE_FILE, TENSORBOARD_FOLDER = "results.json", "table.md", "pass_at_k.png", "tensorboard"
# serve ends its servers within this time; see serving/server_process.py.
SERVE_END_S = 20.0
STATUS_INTERVAL_S = 0.5


def evaluate(options: EvaluationOptions) -> int:
    """Samples the responses that OUTPUT lacks and writes the scores. Returns the exit status: 0 done, 1 failed, 143
    terminated. Raises UserError. Messages name the options of the command line."""
    with naming_flags():
        return _evaluate(options)


def _evaluate(options: EvaluationOptions) -> int:
    model, options = options.model, with_hf_model(options)
    config = run_config(options)
    check_before_sampling(config)
    samples = samples_per_prompt(options)
    compared = [_read_results(folder) for folder in options.compare]
    prompts = read_benchmarks(options, config)
    rows = {f"benchmark {name}": [one.prompt for one in of_name] for name, of_name in prompts.items()}
    if found := list(grader_problems(config.reward, rows, "--reward")):
        raise UserError(found)
    settings = sampling_settings(options, config, prompts)
    with SampleFile(options.output, settings) as file:
        print(wording(options, config), flush=True)
        done = list(file.groups(text_to_compare))
        tasks = plan(prompts, samples, config.seed, [group.key for group in done])
        if tasks:
            wanted = {name: samples[name] * len(tokenized) for name, tokenized in prompts.items()}
            status = sample_missing(config, file, tasks, done, wanted)
            if status:
                return status
            done = list(file.groups(text_to_compare))
    version = done[0].policy_version
    try:
        result = score_all(model, version, settings, samples, done, config.reward.right_reward)
    except ValueError as error:
        raise UserError(f"{error}; correct the grader or the answers, and give another --output") from None
    _write(options.output, result, [*compared, result])
    return 0


def check_before_sampling(config: RunConfig) -> None:
    """Raises UserError for errors that would otherwise appear only after the servers have started."""
    looks = [
        lambda: given_api_key(config.server),
        lambda: external_urls(config.server),
        lambda: check_reward_name(config.reward.function, "--reward"),
    ]
    looks += [] if config.server.urls else [lambda: context_length(config)]
    problems = []
    for look in looks:
        try:
            look()
        except (UserError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems)


def sample_missing(
    config: RunConfig, file: SampleFile, tasks: Sequence[Task], done: Sequence[SampledGroup], wanted: dict[str, int]
) -> int:
    """Samples the tasks with its own servers, or with external ones. Returns the exit status. `wanted`: responses by
    benchmark, of which `done` has some."""
    raise_file_limit(config)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s eval %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    counted: Counter[str] = Counter()
    for group in done:
        counted[group.benchmark] += len(group.responses)
    with SamplingProgress(counted, wanted) as progress:
        try:
            asyncio.run(_until_terminated(config, file, tasks, done[0].policy_version if done else None, progress))
        except asyncio.CancelledError:
            print("terminated; run the same command again to continue", file=sys.stderr)
            return TERMINATED
        except ProjectError as error:
            report(with_flags(error, FLAGS), "error")
            status = FAILED
        except Exception:
            status = report_unexpected("eval")
        else:
            return SUCCEEDED
    print("run the same command again to continue with the samples so far", file=sys.stderr)
    return status


async def _until_terminated(
    config: RunConfig, file: SampleFile, tasks: Sequence[Task], sampled_version: int | None, progress: SamplingProgress
) -> None:
    main = asyncio.current_task()
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)

    def count(group: SampledGroup) -> None:
        progress.add(group.benchmark, len(group.responses), sum(response.num_tokens for response in group.responses))

    incarnation = os.getpid()  # addresses that a killed predecessor left must not be mistaken for the current ones
    async with serving(config, incarnation) as ended:
        waiting = asyncio.create_task(_show_waiting(config, progress))

        def start_clock() -> None:
            waiting.cancel()
            progress.start_clock()

        sampler = Sampler(config, incarnation, file, count, start_clock)
        work = asyncio.create_task(sampler.run(tasks, sampled_version))
        try:
            await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                lines = explanation(_serve_log(config), role="serve")
                raise EvaluationError(f"the servers' role has ended: {' | '.join(lines[:3])} ({_serve_log(config)})")
            work.result()
        finally:
            waiting.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})


async def _show_waiting(config: RunConfig, progress: SamplingProgress) -> None:
    """Shows what the servers do until they are ready."""
    shutil.rmtree(config.run_dir / "status", ignore_errors=True)  # that of an earlier start
    while True:
        status = read_statuses(config.run_dir).get("serve")
        progress.wait(status.phase if status else "starting the role that starts the servers")
        await asyncio.sleep(STATUS_INTERVAL_S)


def _serve_log(config: RunConfig) -> Path:
    return config.run_dir / "logs" / "serve.log"


@asynccontextmanager
async def serving(config: RunConfig, incarnation: int) -> AsyncIterator["asyncio.Task[int]"]:
    """Runs the role `serve` as a process; the task ends with the process."""
    config_file, log_file = config.run_dir / "run.json", _serve_log(config)
    replace_file(config_file, config.to_json())
    make_api_key(config)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "minpro_megatron", "serve"]
    command += ["--config", str(config_file), "--incarnation", str(incarnation)]
    with log_file.open("wb") as log:
        # In a separate session: at an interrupt, this process ends it after the last request to the servers.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    ended = asyncio.create_task(process.wait())
    try:
        yield ended
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait({ended}, timeout=SERVE_END_S)
        if process.returncode is None:
            process.kill()
            await ended


def _read_results(folder: Path) -> Scores:
    path = folder / RESULTS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Scores)
    except OSError as error:
        raise UserError(
            f"--compare {folder}: {path}: {error.strerror}; give the --output of another evaluation"
        ) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"--compare {folder}: {path}: {error}; evaluate it again") from None


def _write(output: Path, result: Scores, shown: Sequence[Scores]) -> None:
    replace_file(output / RESULTS_FILE, msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n")
    table = markdown(shown)
    replace_file(output / TABLE_FILE, table)
    curves = [_curve(title_of(scores.name), scores.pass_at_k) for scores in result.benchmarks]
    (output / PICTURE_FILE).write_bytes(pass_at_k_png(curves, f"{result.model}: pass@k with 95 % intervals"))
    _write_tensorboard(output, result)
    if sys.stdout.isatty():
        make_console().print(Markdown(table))
    else:
        print(table)
    for kind, name in (("results", RESULTS_FILE), ("table", TABLE_FILE), ("picture", PICTURE_FILE)):
        print(f"{kind:<12} {output / name}")
    print(f"TensorBoard  tensorboard --logdir {output / TENSORBOARD_FOLDER}")


def _curve(title: str, pass_at_k: dict[int, Any]) -> Curve:
    found = [pass_at_k[k] for k in sorted(pass_at_k)]
    return Curve(title, [e.value for e in found], [e.low for e in found], [e.high for e in found])


def _write_tensorboard(output: Path, result: Scores) -> None:
    from minpro_megatron.monitor.writer import (
        RunWriter,
    )  # imports torch, which takes seconds, only for a finished evaluation

    shutil.rmtree(output / TENSORBOARD_FOLDER, ignore_errors=True)
    (output / "metrics.jsonl").unlink(missing_ok=True)
    with RunWriter(output) as writer:
        writer.scalars(result.policy_version, scalars(result))
