"""The recipes whose runs differ in more than their objective."""

from collections.abc import Iterable


def with_each_run(recipes: Iterable[str], objectives_of: str | None = None) -> list[str]:
    """`recipes` without those of the paper's models that only replace MinPRO by another objective. Of the model
    `objectives_of` each objective stays, with the paper's delay.

    >>> with_each_run(["recipes.qwen3_8b:minpro", "recipes.qwen3_8b:cispo", "recipes.demo:tiny_moe"])
    ['recipes.qwen3_8b:minpro', 'recipes.demo:tiny_moe']
    """
    return [recipe for recipe in recipes if _has_a_run_of_its_own(recipe) or _shows_an_objective(recipe, objectives_of)]


def _has_a_run_of_its_own(recipe: str) -> bool:
    module, _, name = recipe.partition(":")
    return name.startswith(("minpro", "ctpo_tool")) or not module.startswith("recipes.qwen3")


def _shows_an_objective(recipe: str, model: str | None) -> bool:
    module, _, name = recipe.partition(":")
    return module == model and not name.endswith(("_on_policy", "_bounded"))
