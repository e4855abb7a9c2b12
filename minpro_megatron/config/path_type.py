"""The types of settings that name a file or a folder.

What treats all of them alike, such as the submission to a cluster, finds them by these types (config/listing.py), and
not by a list of names.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class NamesPath:
    """Marks a setting that names a file or a folder. `is_input`: its content decides what the run computes; a run
    resumes with the same content in another place (launch/preflight/inputs.py)."""

    is_input: bool


InputPath = Annotated[str, NamesPath(is_input=True)]
OtherPath = Annotated[str, NamesPath(is_input=False)]
