"""Checks of the run's prompt files: their rows, which of them are selected, and whether they fit."""

from collections.abc import Callable, Iterator
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.in_run import load_benchmarks
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import (
    fitting,
    load_prompts,
    none_fits,
    refuse_too_few,
    select_prompts,
)
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt

NUM_SHORTEST = 64  # prompts of a file that are tokenized first, to find one that fits


def data_problems(config: RunConfig) -> Iterator[str]:
    """A line for each problem of the files that the run samples prompts from."""
    found = list(_file_problems(config))
    yield from found or _prompt_problems(config)


def _file_problems(config: RunConfig) -> Iterator[str]:
    for name in ("train_file", "heldout_file"):
        path = Path(getattr(config.data, name))
        field = f"data.{name} = {path}"
        if not path.is_file():
            yield f"{field}: there is no such file; give a JSON Lines file of id, source, prompt and answer"
        elif path.stat().st_size == 0:
            yield f"{field}: the file is empty; it needs one prompt per line"


def _prompt_problems(config: RunConfig) -> Iterator[str]:
    """Problems of rows, their selection and their prompts, if the files exist."""
    data, wanted = config.data, config.evaluation.num_prompts
    reads: dict[str, Callable[[], list[Prompt]]] = {
        "data.train_file": lambda: select_prompts(load_prompts(data.train_file, "data.train_file"), data),
        "data.heldout_file": lambda: _heldout(config, wanted),
    }
    files: dict[str, list[Prompt]] = {}
    for field, read in reads.items():
        try:
            files[field] = read()
        except (UserError, OSError) as error:
            yield str(error)
    try:
        for benchmark, prompts in zip(config.evaluation.benchmarks, load_benchmarks(config), strict=True):
            files[f"evaluation.benchmarks {benchmark.name}"] = prompts
    except (UserError, OSError) as error:
        yield str(error)
    if Path(config.model.hf_path).is_dir():
        yield from _length_problems(config, files)


def _heldout(config: RunConfig, wanted: int) -> list[Prompt]:
    prompts = load_prompts(config.data.heldout_file, "data.heldout_file")
    refuse_too_few(prompts, config.data.heldout_file, wanted)
    return prompts[:wanted]


def _length_problems(config: RunConfig, files: dict[str, list[Prompt]]) -> Iterator[str]:
    """A line for each file without a prompt of at most sampling.max_prompt_tokens tokens, and for a chat template that
    fails."""
    try:
        rendering = make_rendering(config.data, config.model.hf_path)
        rendering.texts([Prompt(id="", source="", text="a question", answer="")])
    except (UserError, OSError) as error:
        yield str(error)
        return
    try:
        tokenizer = TextTokenizer(config.model.hf_path, read_model_facts(config.model.hf_path))
    except OSError:  # a missing file, which is reported with the model
        return
    except UserError as error:
        yield f"model.hf_path = {config.model.hf_path}: {error}"
        return
    longest = config.sampling.max_prompt_tokens
    for field, prompts in files.items():
        # Almost always one of the shortest fits, and the others need not be tokenized.
        shortest = sorted(prompts, key=lambda prompt: len(prompt.text) + len(prompt.prefix))
        try:
            if not any(fitting(some, tokenizer, longest, rendering) for some in (shortest[:NUM_SHORTEST], shortest)):
                yield str(none_fits(field, longest))
        except UserError as error:  # a prompt that the rendering refuses
            yield f"{field}: {error}"
