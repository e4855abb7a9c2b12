"""The instructions that surround a question in the prompt: the values of `data.instruction`."""

PLACEHOLDER = "{question}"

# DAPO's instruction, as its data set spells it (arXiv:2503.14476, BytedTsinghua-SIA/DAPO-Math-17k).
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

INSTRUCTIONS = {
    "none": PLACEHOLDER,
    "dapo": DAPO_BEFORE + PLACEHOLDER + DAPO_AFTER,
    "boxed": PLACEHOLDER
    + "\nPlease reason step by step, and put your final answer within \\boxed{}.",  # Qwen's for maths
}


def instruction_text(instruction: str) -> str:
    """The text of a named instruction, or `instruction` itself; it contains `{question}` exactly once.

    Raises ValueError for a text without this placeholder: every prompt would be the same.
    """
    text = INSTRUCTIONS.get(instruction, instruction)
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"instruction = {instruction!r} must be one of {', '.join(INSTRUCTIONS)}, or a text with {PLACEHOLDER} "
            "once, where the question goes"
        )
    return text


def instruct(text: str, question: str) -> str:
    """The instruction `text` with `question` inserted; other braces in either have no special meaning."""
    return text.replace(PLACEHOLDER, question)
