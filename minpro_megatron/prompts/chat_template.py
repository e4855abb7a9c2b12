"""A model's chat template, rendered as transformers does, but without its tokenizers, which import torch."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import model_file, read_json_object

# Two times that differ in all that a template may write of them, to the weekday and the second.
_TIMES = ("2001-02-03T04:05:06", "2032-11-24T19:48:57")
# For rendering. A template renders thousands of prompts per second; one that takes far longer is broken or malicious.
TIME_LIMIT_S = 60.0
TIME_LIMIT_PER_PROMPT_S = 0.01
MEMORY_LIMIT_BYTES = 2 * 1024**3

_PROGRAM = Path(__file__).with_name("template_process.py")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The template of a Hugging Face checkpoint: chat_template.jinja, or the one in tokenizer_config.json.

    Templates see the special tokens that tokenizer_config.json or special_tokens_map.json name. Raises UserError or
    FileNotFoundError naming file, rule and remedy if there is no template.
    """

    def __init__(self, hf_path: str, arguments: Mapping[str, Any]) -> None:
        settings = read_json_object(model_file(hf_path, "tokenizer_config.json"))
        self._path, self._template = _find_template(hf_path, settings)
        self._variables = _special_tokens(hf_path, settings) | dict(arguments)

    def render_all(
        self, questions: Sequence[str], time_limit_s: float = TIME_LIMIT_S, systems: Sequence[str] | None = None
    ) -> list[str]:
        """Each question as the user's only turn, after its system message unless that is empty, followed by the
        beginning of the assistant's turn.

        The text includes the begin token if the template writes one, so tokenize it without adding any. Raises
        UserError naming the file if the template fails, or exceeds its limits of time and memory.
        """
        return self._render(questions, None, time_limit_s, systems)

    def after_response(self) -> str:
        """The text that the template writes after the assistant's response, starting with the token that ends its turn;
        empty if the template changes the response. Raises UserError as render_all does."""
        response = "a response"
        (text,) = self._render(["a question"], response, TIME_LIMIT_S)
        before, _, after = text.rpartition(response)
        return after if before else ""

    def around_answer(self, role: str) -> tuple[str, str]:
        """The texts that the template writes between the assistant's response and a following message of `role`, and
        after that message until the assistant's next response begins. Raises UserError as render_all does, and if the
        template changes the texts of these messages."""
        response, answer = "a response", "an answer to it"
        reply = {"role": role, "content": answer}
        (text,) = self._render(["a question"], response, TIME_LIMIT_S, reply=reply)
        head, found, after = text.rpartition(answer)
        _, also_found, before = head.rpartition(response)
        if not found or not also_found:
            raise self._error(f"it does not show a message of the role {role!r} as it is, which environment.role needs")
        return before, after

    def shows_time(self) -> bool:
        """Whether the present time, or the date, changes the text. Raises UserError as render_all does."""
        if "strftime_now" not in self._template:  # its only clock
            return False
        first, second = (self._render(["a question"], None, TIME_LIMIT_S, now=now) for now in _TIMES)
        return first != second

    def _render(
        self,
        questions: Sequence[str],
        response: str | None,
        time_limit_s: float,
        systems: Sequence[str] | None = None,
        reply: Mapping[str, str] | None = None,
        now: str | None = None,
    ) -> list[str]:
        limit_s = time_limit_s + TIME_LIMIT_PER_PROMPT_S * len(questions)
        request = {
            "template": self._template,
            "variables": self._variables,
            "questions": list(questions),
            "systems": list(systems or [""] * len(questions)),
            "answer": response,
            "reply": reply,
            "now": now,
            "memory_bytes": MEMORY_LIMIT_BYTES,
            "cpu_s": int(limit_s) + 1,
        }
        command = [sys.executable, "-I", str(_PROGRAM)]
        try:
            run = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise self._error(f"rendering {len(questions)} prompts took more than {limit_s:.3g} s") from None
        if run.returncode:
            last = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise self._error(f"rendering ended with status {run.returncode} ({last or 'no message'})")
        answer = json.loads(run.stdout)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer["texts"]

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"data.chat_template = true: the template in {self._path} failed ({problem}); correct it, or set "
            "data.chat_template to false"
        )


def _find_template(hf_path: str, settings: dict[str, Any]) -> tuple[Path, str]:
    """The file with the default template, and the template. As in transformers, chat_template.jinja has precedence."""
    try:
        path = model_file(hf_path, "chat_template.jinja")
        return path, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        path = model_file(hf_path, "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, one of which is the default
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str) or not template:
        raise UserError(
            f"data.chat_template = true: neither {path} nor a file chat_template.jinja next to it has a (default) "
            "chat template; set data.chat_template to false for a base model"
        )
    return path, template


def _special_tokens(hf_path: str, settings: dict[str, Any]) -> dict[str, str]:
    tokens = {name: settings.get(name) for name in _SPECIAL_TOKENS}
    if "added_tokens_decoder" not in settings:  # if it is present, transformers does not read the older file
        with suppress(FileNotFoundError):
            tokens |= read_json_object(model_file(hf_path, "special_tokens_map.json"))
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if name in _SPECIAL_TOKENS and isinstance(text, str)}
