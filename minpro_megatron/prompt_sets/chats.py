"""Questions stored as chats, as in verl and slime."""

import json
from pathlib import Path
from typing import Any

from minpro_megatron.prompt_sets import rows
from minpro_megatron.prompt_sets.instructions import is_instruction


def chat_in(prompt: Any) -> list[Any] | None:
    """The messages of a prompt that is a chat, possibly written as JSON text; None for plain text."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[") and '"role"' in prompt:
        try:
            prompt = json.loads(prompt)
        except (ValueError, RecursionError):
            return None
    return prompt if isinstance(prompt, list) else None


def system_and_question(path: Path, number: int, messages: list[Any]) -> tuple[str, str]:
    """The system message, "" if there is none, and the text of a prompt that is a chat of one user's turn. A system
    message that is a known instruction is ignored. Raises DamagedRow for any other chat."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    system = ""
    if roles[:1] == ["system"]:
        system = rows.text_field(path, number, messages[0], "content")
        messages, roles = messages[1:], roles[1:]
    if roles != ["user"]:
        rule = f"must be one message of the role user, after a system message or none, has the roles {roles}"
        raise rows.DamagedRow(path, number, "prompt", rule)
    return "" if is_instruction(system) else system, rows.text_field(path, number, messages[0], "content")


def only_message(path: Path, number: int, messages: list[Any]) -> str:
    """The text of a prompt that is a chat of one user's turn, without a system message of its own. Raises DamagedRow
    for any other chat."""
    system, text = system_and_question(path, number, messages)
    if system:
        rule = "must be one message of the role user, has also a system message; `minpro prepare custom` keeps it"
        raise rows.DamagedRow(path, number, "prompt", rule)
    return text
