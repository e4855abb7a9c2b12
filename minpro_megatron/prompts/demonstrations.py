"""Demonstrations: prompts with a whole response each, for supervised fine-tuning (data.demonstrations)."""

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import read_lines
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.prompts.turn_end import turn_end
from minpro_megatron.records import Prompt

log = logging.getLogger(__name__)
SETTING = "data.demonstrations"


class _Row(msgspec.Struct):
    id: str
    prompt: str
    response: str
    source: str = ""
    answer: str = ""
    prefix: str = ""
    system: str = ""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The tokens of a prompt and of the response to it, which ends with a stop token; int32."""

    prompt: Prompt
    prompt_token_ids: np.ndarray
    response_token_ids: np.ndarray


def read_demonstrations(config: RunConfig) -> list[Demonstration]:
    """The demonstrations of data.demonstrations that fit sampling.max_prompt_tokens and sampling.max_response_tokens;
    longer ones are dropped, with a warning that counts them.

    The prompt is presented as the run's settings say. The response ends with the token that ends the assistant's turn
    in the chat template, or without a template with the model's stop token. Special tokens in a response are ordinary
    characters. Raises UserError for a damaged row, and if none is left; OSError for a file of the model.
    """
    path, rows = Path(config.data.demonstrations), _read_rows(config.data.demonstrations)
    facts = read_model_facts(config.model.hf_path)
    tokenizer = TextTokenizer(config.model.hf_path, facts)
    prompts = [_prompt(row) for row in rows]
    encoded = make_rendering(config.data, config.model.hf_path).encode(prompts, tokenizer)
    prefixes = tokenizer.encode_all([row.prefix for row in rows])
    responses = tokenizer.encode_given([row.response for row in rows])
    end = np.asarray([_end_token(config, facts.stop_token_ids[0])], np.int32)
    found = [
        Demonstration(prompt, np.concatenate([question, prefix]), np.concatenate([response, end]))
        for prompt, question, prefix, response in zip(prompts, encoded, prefixes, responses, strict=True)
    ]
    kept = [one for one in found if _fits(one, config)]
    if dropped := len(found) - len(kept):
        log.warning(
            "%s: dropped %d of %d rows, longer than sampling.max_prompt_tokens = %d or sampling.max_response_tokens = "
            "%d, or with an empty prompt",
            SETTING, dropped, len(found), config.sampling.max_prompt_tokens, config.sampling.max_response_tokens,
        )  # fmt: skip
    if not kept:
        raise UserError(
            f"{SETTING} = {path}: none of its {len(found)} rows fits sampling.max_prompt_tokens = "
            f"{config.sampling.max_prompt_tokens} and sampling.max_response_tokens = "
            f"{config.sampling.max_response_tokens}; raise them"
        )
    return kept


def _read_rows(path: str) -> list[_Row]:
    rows = []
    for number, line in enumerate(read_lines(Path(path), SETTING), start=1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=_Row))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{SETTING} = {path}, line {number}: {error}; a row has the texts id, prompt and response"
            ) from None
        if not rows[-1].response:
            raise UserError(f"{SETTING} = {path}, line {number}: response is empty; remove the row")
    if not rows:
        raise UserError(f"{SETTING} = {path}: the file has no rows")
    return rows


def _prompt(row: _Row) -> Prompt:
    return Prompt(
        id=row.id, source=row.source, text=row.prompt, answer=row.answer, prefix=row.prefix, system=row.system
    )


def _end_token(config: RunConfig, stop_token_id: int) -> int:
    if not config.data.chat_template:
        return stop_token_id
    end = turn_end(config.data, config.model.hf_path)
    if end is None:
        raise UserError(
            f"data.chat_template = true: the template of model.hf_path = {config.model.hf_path} writes no special "
            "token after a response, so demonstrations would have no end; set data.chat_template to false: prompts are "
            "then plain text, and a response ends with the model's stop token"
        )
    return end[1]


def _fits(one: Demonstration, config: RunConfig) -> bool:
    sampling = config.sampling
    return (
        1 <= len(one.prompt_token_ids) <= sampling.max_prompt_tokens
        and len(one.response_token_ids) <= sampling.max_response_tokens
    )
