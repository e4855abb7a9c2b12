"""What a user can mend: told as one line a problem, without a traceback."""

from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong. `problems` has one line each: field, value, rule, remedy."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        given = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [" ".join(problem.split()) for problem in given]
        super().__init__("\n".join(self.problems))
