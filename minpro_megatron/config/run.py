"""The settings of a run: one immutable object that every role reads from run.json."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.config import rules_between_sections as rules
from minpro_megatron.config.alarms import AlarmsConfig
from minpro_megatron.config.base import Section
from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.collector import CollectorConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.debug import DebugConfig
from minpro_megatron.config.demonstrations import refuse_contradicting_demonstrations
from minpro_megatron.config.environment import EnvironmentConfig
from minpro_megatron.config.evaluation import EvaluationConfig
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.objective import IMPORTED, MinproConfig, ObjectiveConfig
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.path_type import OtherPath
from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.config.renamed import current_name, under_current_names
from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.config.wandb import WandbConfig
from minpro_megatron.errors import UserError


class RunConfig(Section):
    """The settings of a run: made by a recipe, validated at construction, written to `run_dir/run.json` and read by
    every role."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of the run and of its folder in runs_dir."
    )
    runs_dir: OtherPath = Field(default="runs", description="Folder that contains the run folders.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the run, from which every other seed is derived.")
    num_global_steps: int = Field(default=120, ge=1, description="Number of global steps of the run.")
    device: Literal["cpu", "cuda"] = Field(default="cuda", description="Device on which the trainer's ranks compute.")
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    objective: ObjectiveConfig = MinproConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    staleness: StalenessConfig = StalenessConfig()
    server: ServerConfig = ServerConfig()
    publish: PublishConfig = PublishConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    reward: RewardConfig = RewardConfig()
    collector: CollectorConfig = CollectorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    wandb: WandbConfig = WandbConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def samples_responses(self) -> bool:
        """Whether the run samples what it trains on: not on another run's journal, and not on demonstrations."""
        return not (self.debug.journal or self.data.demonstrations)

    @property
    def publishes_at_start(self) -> bool:
        """Whether the trainer of a new run sends version 0 to the servers before they sample. On shared GPUs it is not
        loaded before they have sampled, and the timer sends no weights."""
        can_publish = self.samples_responses and self.debug.trainer == "megatron" and not self.server.takes_turns
        return self.publish.at_start and can_publish

    @property
    def drops_groups(self) -> bool:
        """Whether groups are dropped because of their rewards, so that more of them are sampled than are trained on."""
        return self.batch.dynamic_sampling or bool(self.data.filter)

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed(cls, values: Any) -> Any:
        return under_current_names(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        rules.batches_fit(self.batch, self.parallel, self.sampling, self.loss)
        refuse_contradicting_demonstrations(self)
        rules.episodes_can_be_sampled(self.environment, self.sampling, self.data)
        rules.routes_can_be_replayed(self.model, self.staleness, self.publish, self.checkpoint, self.alarms)
        rules.supports_can_be_replayed(self.sampling, self.server)
        rules.runs_on_device(self.device, self.model, self.optimizer)
        if self.server.takes_turns:
            rules.turns_are_possible(self.staleness, self.server, self.publish, self.device, self.parallel)
        rules.watched_parts_exist(self.debug, self.num_global_steps, self.parallel)
        rules.servers_are_reached(self.publish, self.server)
        return self

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "RunConfig":
        """The settings in `text`. Raises ValueError with one line per problem if they are not valid."""
        return parse_run_config(json.loads(text))


def parse_run_config(values: dict[str, Any]) -> RunConfig:
    """A validated RunConfig. Raises ValueError with one line per problem, which names field, value and rule."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_problem(entry) for entry in error.errors()) from None


def _problem(entry: Any) -> str:
    if entry["type"] == "union_tag_invalid":
        return _unknown_objective(entry)
    where = ".".join(str(part) for part in entry["loc"]) or "run"
    shown = "" if isinstance(entry["input"], dict | Section) else f" (got {entry['input']!r})"
    return f"{where}: {entry['msg'].removeprefix('Value error, ')}{shown}{_similar_choice(entry)}"


def _similar_choice(entry: Any) -> str:
    """A hint at the permitted values that are most similar to the given one, if the permitted values are a list."""
    context = entry.get("ctx", {})
    choices = re.findall(r"'([^']+)'", str(context.get("expected") or ""))
    given = entry["input"]
    return did_you_mean(given, choices) if isinstance(given, str) else ""


def _unknown_objective(entry: Any) -> str:
    """The objective is the only section whose fields depend on a name in it."""
    name = str(entry["ctx"]["tag"])
    known = [tag for tag in re.findall(r"'([^']+)'", entry["ctx"]["expected_tags"]) if tag != IMPORTED]
    return (
        f"objective.name = {name!r}: there is no such objective{did_you_mean(name, known)}; known: {', '.join(known)}, "
        "or the import path of your own function, such as package.module:function"
    )


def with_overrides(config: RunConfig, assignments: list[str]) -> RunConfig:
    """`config` with the `section.key=value` assignments applied in order. Values are JSON, or plain text if they are
    not valid JSON or if the setting is a string. `objective.name=...` first replaces the section by the defaults of
    that objective.

    Raises ValueError for an assignment without '=', an unknown key, or a value the field refuses.
    """
    values = under_current_names(config.model_dump(), old_wins=True)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(
                f"override {assignment!r}: expected section.key=value, such as optimizer.learning_rate=1e-5"
            )
        path = current_name(path.strip())
        target, key = _find_setting(values, path, assignment)
        value = _parse_value(text, target.get(key))
        if path == "objective.name" and value != target[key]:
            values["objective"] = _objective_defaults(value)
        else:
            target[key] = value
    return parse_run_config(values)


def _find_setting(values: dict[str, Any], path: str, assignment: str) -> tuple[dict[str, Any], str]:
    *sections, key = path.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            hint = did_you_mean(section, target)
            raise UserError(
                f"override {assignment!r}: there is no section {section!r}{hint}; known: {', '.join(target)}"
            )
        target = target[section]
    if key not in target and not _is_dictionary(sections):
        hint = _settings_named(key, values) or did_you_mean(key, target)
        raise UserError(f"override {assignment!r}: there is no setting {key!r}{hint}; known: {', '.join(target)}")
    return target, key


def _is_dictionary(path: list[str]) -> bool:
    """Whether the setting at `path` is a dictionary whose keys the user chooses, such as server.arguments."""
    annotations: list[Any] = [RunConfig]
    for name in path:
        found = [getattr(section, "model_fields", {}).get(name) for section in annotations]
        annotations = [one for field in found if field is not None for one in _members(field.annotation)]
    return any(get_origin(annotation) is dict for annotation in annotations)


def _members(annotation: Any) -> list[Any]:
    """The types of a union, without what Annotated adds to them; another type alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _settings_named(key: str, values: dict[str, Any]) -> str:
    """A hint at the settings of this name in other sections; empty without any."""
    same = [path for path in _paths_in(values) if path.rpartition(".")[2] == key]
    return f" (did you mean {' or '.join(same)}?)" if same else ""


def _paths_in(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths_in(value, f"{prefix}{key}.")


def _parse_value(text: str, current: Any) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    # name=2024 is a name, not a number
    return text if isinstance(current, str) and not isinstance(value, str) else value


def _objective_defaults(name: Any) -> dict[str, Any]:
    try:
        return TypeAdapter(ObjectiveConfig).validate_python({"name": name}).model_dump()
    except ValidationError as error:
        raise UserError(map(_problem, error.errors())) from None
