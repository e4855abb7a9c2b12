"""The arithmetic of delay mode: which version samples a batch, and which batches a version samples.

Global steps count from 0, and step k consumes batch k. Policy version v exists once v steps are complete,
so at step k the trainer holds version k. Delay n: batch k is sampled with version max(0, k - n).
"""


def sampling_version(batch_index: int, delay: int) -> int:
    """The policy version that samples batch `batch_index`.

    Version k - n is the newest that exists while step k - n runs, which is when batch k is generated: n
    steps before it is consumed. Before step 0 there are only the initial weights, so batches 0 .. n share
    version 0.

    >>> [sampling_version(k, 2) for k in range(5)]
    [0, 0, 0, 1, 2]
    """
    return max(0, batch_index - delay)


def batches_of_version(version: int, delay: int, num_steps: int) -> range:
    """The batches that version `version` samples, in order; empty near the end of the run.

    The inverse of `sampling_version`: version 0 has batches 0 .. n, every later one has batch v + n alone,
    as long as the run of `num_steps` steps consumes it. The last n + 1 versions (num_steps - n ..
    num_steps) have none.

    >>> [list(batches_of_version(v, 2, 5)) for v in range(6)]
    [[0, 1, 2], [3], [4], [], [], []]
    """
    first = 0 if version == 0 else version + delay
    return range(min(first, num_steps), min(version + delay + 1, num_steps))


def staleness(current_version: int, oldest_version: int) -> int:
    """Versions published since the oldest token of a group was sampled: what "n steps stale" counts."""
    return current_version - oldest_version


def expected_staleness(step: int, delay: int) -> int:
    """The staleness of every group at global step `step`: step - max(0, step - n) = min(step, n)."""
    return min(step, delay)


def evaluated_versions(num_steps: int, every_steps: int) -> list[int]:
    """The versions that are evaluated: the first, the last, each multiple of `every_steps` (0: no others).

    >>> evaluated_versions(5, 2)
    [0, 2, 4, 5]
    """
    between = range(every_steps, num_steps, every_steps) if every_steps else ()
    return [0, *between, num_steps]
