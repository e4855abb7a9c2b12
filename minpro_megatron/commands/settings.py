"""List the settings: name, value, default and description.

    minpro settings                              every setting with its default
    minpro settings optimizer                    those of a section, or one setting by its name
    minpro settings recipes.demo:tiny_moe        the values of a recipe; `*` marks those that are not the default
    minpro settings recipes.demo:tiny_moe optimizer optimizer.learning_rate=1e-5

They are changed on the command line of `launch`, as section.key=value.
"""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterator

from minpro_megatron.command_line import command_parser, did_you_mean
from minpro_megatron.errors import UserError, run_reporting


def main(arguments: list[str] | None = None, prog: str = "minpro settings") -> int:
    """0, or 2 after a message about an unknown recipe or section."""
    parser = command_parser(__doc__, prog)
    parser.add_argument(
        "given",
        nargs="*",
        metavar="RECIPE|section|section.key=value",
        help="a recipe, sections or settings to list, and settings to change, in any order",
    )
    options = parser.parse_args(arguments)
    return run_reporting(lambda: _list(options.given))


def _list(given: list[str]) -> int:
    overrides = [word for word in given if "=" in word]
    recipes = [word for word in given if ":" in word and word not in overrides]
    chosen = [word for word in given if word not in [*overrides, *recipes]]
    if len(recipes) > 1 or (overrides and not recipes):
        wrong = recipes[1] if len(recipes) > 1 else overrides[0]
        raise UserError(f"{wrong}: give one recipe, and the settings to change with it")
    print("\n".join(_lines(recipes[0] if recipes else "", overrides, chosen)))
    return 0


def _lines(recipe: str, overrides: list[str], chosen: list[str]) -> Iterator[str]:
    from minpro_megatron.config.listing import Setting, as_text, settings_of, value_of
    from minpro_megatron.launch.recipe import apply_overrides, load_recipe

    every = list(settings_of())
    for name in chosen:
        if not any(_is_in(setting.path, name) for setting in every):
            raise UserError(f"there is no section or setting {name!r}{_similar(name, [one.path for one in every])}")
    config = apply_overrides(load_recipe(recipe), overrides) if recipe else None

    def line(setting: Setting) -> str | None:
        if config is None:
            return f"{setting.path} = {setting.default}" if setting.default else f"{setting.path} (must be given)"
        try:
            value = as_text(value_of(config, setting.path))
        except KeyError:  # of another objective, or of the entries of a list
            return None
        mark = "" if value == setting.default else f"  * (default: {setting.default})" if setting.default else ""
        return f"{setting.path} = {value}{mark}"

    seen = set()
    for setting in every:
        shown = line(setting)
        if shown is None or (config is not None and setting.path in seen):
            continue
        if not chosen or any(_is_in(setting.path, name) for name in chosen):
            seen.add(setting.path)
            yield shown
            yield from _wrapped(setting.description)


def _similar(name: str, paths: list[str]) -> str:
    """The hint at the most similar sections, else settings, else the setting whose last part is the most similar."""
    sections = dict.fromkeys(path.partition(".")[0] for path in paths)
    by_last_part = {path.rpartition(".")[2]: path for path in reversed(paths)}
    last_parts = difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.7)
    hint = did_you_mean(name, sections) or did_you_mean(name, paths)
    return hint or (f" (did you mean {by_last_part[last_parts[0]]}?)" if last_parts else "")


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _wrapped(text: str) -> list[str]:
    """Wrapped for a terminal; one line for a file or a pipe."""
    if not sys.stdout.isatty():
        return [f"    {text}"]
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width=width, initial_indent="    ", subsequent_indent="    ")
