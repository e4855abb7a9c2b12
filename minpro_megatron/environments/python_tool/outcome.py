"""The result of running the code of one call."""

from dataclasses import dataclass

NOTHING = "(no output; print what you need)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`text` is what the policy reads; `problem` is empty if the code ended normally."""

    text: str
    problem: str = ""


def outcome(output: str, problem: str, max_chars: int) -> Outcome:
    """The output, cut in its middle if it is long, and then the problem.

    The beginning of an output says what the code did, and its end how a traceback ends.
    """
    if len(output) > max_chars:
        half = max_chars // 2
        output = f"{output[:half]}\n... ({len(output) - 2 * half} characters left out)\n{output[len(output) - half :]}"
    parts = [output.rstrip("\n"), f"error: {problem}" if problem else ""]
    return Outcome("\n".join(part for part in parts if part) or NOTHING, problem)
