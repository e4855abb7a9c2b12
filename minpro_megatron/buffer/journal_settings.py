"""What a journal's readers must know of the settings of its run, which are in the run.json beside it."""

from pathlib import Path

from minpro_megatron.files.json_files import read_json


def top_k_of_run(journal: Path) -> int | None:
    """The run's sampling.top_k; None if it is not known, because the journal was copied without its run.json.

    Whether behavior log-probs are those among kept ids cannot be seen from a journal whose kept ids were pruned.
    """
    settings = read_json(journal.with_name("run.json"))
    if not settings:
        return None
    sampling = settings.get("sampling")
    top_k = sampling.get("top_k", 0) if isinstance(sampling, dict) else 0  # earlier versions had no top_k
    return top_k if isinstance(top_k, int) else None
