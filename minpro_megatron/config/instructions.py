"""What a question is wrapped in before the policy sees it: the values of `data.instruction`."""

PLACE = "{question}"

# DAPO's, as its data set spells it (arXiv:2503.14476, BytedTsinghua-SIA/DAPO-Math-17k).
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

INSTRUCTIONS = {
    "none": PLACE,
    "dapo": DAPO_BEFORE + PLACE + DAPO_AFTER,
    "boxed": PLACE + "\nPlease reason step by step, and put your final answer within \\boxed{}.",  # Qwen's for maths
}


def instruction_text(instruction: str) -> str:
    """The text of a named instruction, or `instruction` itself; `{question}` stands in it once.

    Raises ValueError for a text without that place: every prompt would be the same.
    """
    text = INSTRUCTIONS.get(instruction, instruction)
    if text.count(PLACE) != 1:
        raise ValueError(
            f"instruction = {instruction!r} must be one of {', '.join(INSTRUCTIONS)}, or a text with {PLACE} once, "
            "where the question goes"
        )
    return text


def instruct(text: str, question: str) -> str:
    """`question` in its place in an instruction's text; braces in either mean nothing else."""
    return text.replace(PLACE, question)
