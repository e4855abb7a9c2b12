"""The README's line on what has been verified on a GPU, from the record of `minpro gpu-check`."""

import re
import textwrap
from pathlib import Path

from minpro_megatron.gpu_checks.pages import status_line
from minpro_megatron.gpu_checks.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
README, RECORDS = ROOT / "README.md", ROOT / "benchmarks"
_WIDTH = 120
# The list item of the status box that begins so, with its continued lines.
_ITEM = re.compile(r"^> - \*Verified on GPU\*:.*\n(?:>   .*\n)*", re.MULTILINE)


def with_status(readme: str, record: Record | None = None) -> str:
    """The README with the line of the record, by default the repository's. Raises ValueError if the README does not
    have exactly one such line."""
    text = status_line(record or read_record(RECORDS))
    if len(_ITEM.findall(readme)) != 1:
        raise ValueError("README.md: the status box must have one item that begins with *Verified on GPU*:")
    wrapped = textwrap.wrap(
        text, _WIDTH, initial_indent="> - ", subsequent_indent=">   ", break_long_words=False, break_on_hyphens=False
    )
    item = "\n".join(wrapped) + "\n"
    return _ITEM.sub(lambda match: item, readme)
