"""The option --parallel of several commands: a mesh as text, such as tensor=2,pipeline=2,pipeline_layers=3+2."""

import argparse
from typing import Any

from pydantic import ValidationError

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import UserError

# What messages about the settings of the mesh are to be named.
FLAGS = {f"parallel.{axis}": f"--parallel {axis}" for axis in ParallelConfig.axes()}


def add_parallel(parser: "argparse._ActionsContainer") -> None:
    """Adds the option; `parse_parallel` and `parallel_config` read its value."""
    parser.add_argument(
        "--parallel",
        default="",
        metavar="AXIS=N,...",
        help="the mesh: the degrees of tensor, pipeline, virtual_pipeline, context, expert and expert_tensor, each 1 "
        "unless given; data, the smallest that fits unless given; pipeline_layers=2+3+2, the layers of each stage. It "
        "has tensor x pipeline x context x data ranks (default: one rank)",
    )


def parse_parallel(text: str) -> dict[str, Any]:
    """{axis: degree} of "tensor=2,context=2"; "pipeline_layers=3+2+1" is a list.

    Raises UserError for an unknown or repeated axis, or a degree that is not a number.
    """
    axes = ParallelConfig.axes()
    degrees: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, degree = (piece.strip() for piece in part.partition("="))
        if axis not in axes:
            hint = did_you_mean(axis, axes)
            raise UserError(f"--parallel {text}: there is no axis {axis!r}{hint}; known: {', '.join(axes)}")
        if axis in degrees:
            raise UserError(f"--parallel {text}: {axis} is given twice")
        listed = axis == "pipeline_layers"
        numbers = [number.strip() for number in degree.split("+")] if listed else [degree]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            needed = f"whole numbers, such as {axis}=2+3" if listed else f"a whole number, such as {axis}=2"
            raise UserError(f"--parallel {text}: {axis} needs {needed} (got {degree!r})")
        degrees[axis] = [int(number) for number in numbers] if listed else int(degree)
    return degrees


def parallel_config(text: str) -> ParallelConfig:
    """The mesh. Raises UserError for whatever is wrong with it."""
    try:
        return ParallelConfig(**parse_parallel(text))
    except ValidationError as error:
        raise UserError(
            f"--parallel {text}: {''.join(f'{name}: ' for name in map(str, entry['loc']))}"
            f"{entry['msg'].removeprefix('Value error, ')}"
            for entry in error.errors()
        ) from None
