"""The seven benchmarks of arXiv:2601.22718, with the number of samples per prompt of its protocol."""

from dataclasses import dataclass

# temperature 1.0, top-p 0.7, at most 20,480 tokens per response
TEMPERATURE, TOP_P, MAX_RESPONSE_TOKENS = 1.0, 0.7, 20480
# A prompt's samples are requested a few at a time: groups of all 128 would leave servers idle at the end, and a crash
# loses the requests in progress.
SAMPLES_PER_REQUEST = 2


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`title` is the heading of its column, `num_prompts` the number of its prompts."""

    title: str
    num_prompts: int
    samples_per_prompt: int


# Small sets are sampled more often: one prompt more or less of AIME is 3 %.
BENCHMARKS = {
    "aime24": Benchmark("AIME24", 30, 128),
    "aime25": Benchmark("AIME25", 30, 128),
    "amc23": Benchmark("AMC23", 40, 128),
    "math500": Benchmark("MATH500", 500, 2),
    "olympiad": Benchmark("Olympiad", 675, 2),
    "minerva": Benchmark("Minerva", 272, 2),
    "gsm8k": Benchmark("GSM8K", 1319, 2),
}
# For a benchmark from the user's own file.
OTHER_SAMPLES_PER_PROMPT = 2


def title_of(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def samples_of(name: str) -> int:
    return BENCHMARKS[name].samples_per_prompt if name in BENCHMARKS else OTHER_SAMPLES_PER_PROMPT
