"""The settings of a run: one immutable object that every role reads from run.json."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from minpro_megatron.command_line import did_you_mean
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
from minpro_megatron.config.model import ModelConfig, layer_backend_of
from minpro_megatron.config.objective import MinproConfig, ObjectiveConfig
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
    def drops_groups(self) -> bool:
        """Whether groups are dropped because of their rewards, so that more of them are sampled than are trained on."""
        return self.batch.dynamic_sampling or bool(self.data.filter)

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed(cls, values: Any) -> Any:
        return under_current_names(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        batch, parallel, sampling = self.batch, self.parallel, self.sampling
        if batch.num_prompts % batch.mini_batch_prompts:
            raise ValueError(
                f"batch.num_prompts = {batch.num_prompts} must be a multiple of batch.mini_batch_prompts = "
                f"{batch.mini_batch_prompts}: a global step is a whole number of optimizer updates"
            )
        longest = sampling.max_prompt_tokens + sampling.max_response_tokens
        # a row is split into 2 chunks per context rank, and each chunk into one piece per tensor rank
        multiple = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
        padded = -(-longest // multiple) * multiple
        if padded > batch.max_tokens_per_row:
            raise ValueError(
                f"sampling.max_prompt_tokens + sampling.max_response_tokens = {longest}, padded to a multiple of "
                f"{multiple} for the mesh: {padded} must fit in a row: raise batch.max_tokens_per_row = "
                f"{batch.max_tokens_per_row}"
            )
        sequences = batch.mini_batch_prompts * batch.responses_per_prompt
        if sequences < parallel.data_size:
            raise ValueError(
                f"an update has {sequences} sequences for parallel.data = {parallel.data_size} ranks: "
                "raise batch.mini_batch_prompts or lower parallel.data"
            )
        penalty = self.loss.overlong_penalty
        if penalty.enabled and penalty.buffer_tokens > sampling.max_response_tokens:
            raise ValueError(
                f"loss.overlong_penalty.buffer_tokens = {penalty.buffer_tokens} must not exceed "
                f"sampling.max_response_tokens = {sampling.max_response_tokens}: lower it"
            )
        refuse_contradicting_demonstrations(self)
        self._episodes_can_be_sampled()
        self._routes_can_be_replayed()
        self._supports_can_be_replayed()
        self._runs_on_device()
        if self.server.takes_turns:
            self._turns_are_possible()
        self._watched_parts_exist()
        self._servers_are_reached()
        return self

    def _episodes_can_be_sampled(self) -> None:
        environment, turns = self.environment, self.sampling.max_turns
        if environment.enabled != (turns > 1):
            raise ValueError(
                f"sampling.max_turns = {turns} with environment.name = {environment.name}: without an environment a "
                "response has one turn, and with one the policy needs at least 2 to read an answer; set both"
            )
        if environment.enabled and not self.data.chat_template:
            raise ValueError(
                f"environment.name = {environment.name} needs data.chat_template = true: the template's markers of a "
                "turn surround the environment's answers; set it, or environment.name to none"
            )

    def _routes_can_be_replayed(self) -> None:
        is_bounded, replay = self.staleness.mode == "bounded", self.model.routing_replay
        if replay == "rollout" and is_bounded and self.publish.pause_mode == "retract":
            raise ValueError(
                "model.routing_replay = rollout with staleness.mode = bounded and publish.pause_mode = retract: the "
                "servers recompute a retracted response with the new weights and then report the experts of the new "
                "weights for tokens that the old weights sampled; set publish.pause_mode to abort or in_place, or "
                "model.routing_replay to none"
            )
        if replay != "scored":
            return
        if is_bounded:
            raise ValueError(
                "model.routing_replay = scored: with staleness.mode = bounded a response is scored under several "
                "weights, which choose different experts; set model.routing_replay to none, or to rollout with "
                "publish.pause_mode = abort or in_place"
            )
        if self.staleness.delay_steps and (self.checkpoint.saves_before_end or self.alarms.stop_on):
            raise ValueError(
                "model.routing_replay = scored: checkpoints do not hold the routes of batches scored with earlier "
                "weights; set checkpoint.every_steps and checkpoint.every_minutes to 0 and alarms.stop_on to [], or "
                "model.routing_replay to rollout or none"
            )

    def _supports_can_be_replayed(self) -> None:
        given = {name.replace("-", "_"): value for name, value in self.server.arguments.items()}
        limit, top_k = given.get("sampling_mask_max_tokens"), self.sampling.top_k
        if top_k and isinstance(limit, int) and limit < top_k:
            raise ValueError(
                f"server.arguments: sampling_mask_max_tokens = {limit} must be at least sampling.top_k = {top_k}, and "
                "higher because equally likely tokens are kept together; raise it, or lower sampling.top_k"
            )

    def _runs_on_device(self) -> None:
        if self.device == "cpu" and self.model.dtype != "float32":
            raise ValueError(f"model.dtype = {self.model.dtype} needs device = cuda; set model.dtype to float32")
        attention = self.model.attention_backend
        if attention != "auto" and layer_backend_of(self.model.backend, self.device, self.model.dtype) == "torch":
            raise ValueError(
                f"model.attention_backend = {attention} selects kernels of Transformer Engine, and the layers are "
                "torch's (model.backend, device and model.dtype decide this); set it to auto"
            )
        if self.device == "cuda" and self.model.dtype == "bfloat16":
            return
        if self.model.backend == "transformer_engine":
            raise ValueError(
                "model.backend = transformer_engine needs device = cuda and model.dtype = bfloat16, because its "
                "attention on packed rows does not support float32; set model.backend to auto or torch"
            )
        if self.optimizer.cpu_offload:
            raise ValueError(
                f"optimizer.cpu_offload = {self.optimizer.cpu_offload} moves the float32 state of bfloat16 weights "
                "from a GPU to its host: it needs device = cuda and model.dtype = bfloat16; set it to 0"
            )

    def _turns_are_possible(self) -> None:
        server, remedy = self.server, "or set server.placement to disaggregated"
        if self.staleness.mode != "delay":
            raise ValueError(
                f"server.placement = shared with staleness.mode = {self.staleness.mode}: in bounded mode the servers "
                "never stop sampling, and so never release their memory; set staleness.mode to delay, " + remedy
            )
        if server.urls:
            raise ValueError(
                "server.placement = shared with server.urls: the run has to start and stop the servers that use its "
                "GPUs; remove server.urls, " + remedy
            )
        if self.device != server.device:
            raise ValueError(
                f"server.placement = shared with device = {self.device} and server.device = {server.device}: trainer "
                "and servers then have nothing to share; set both to the same, " + remedy
            )
        if self.device == "cpu":
            return
        if self.publish.transport == "broadcast":
            raise ValueError(
                "server.placement = shared with publish.transport = broadcast: NCCL refuses a group with two members "
                "on one GPU; choose another transport, " + remedy
            )
        needed, ranks = server.count * server.tensor_parallel, self.parallel.world_size
        if needed > ranks:
            raise ValueError(
                f"server.placement = shared: server.count x server.tensor_parallel = {needed} exceeds the trainer's "
                f"{ranks} GPUs; lower one of them, " + remedy
            )

    def _watched_parts_exist(self) -> None:
        debug, num_steps, num_ranks = self.debug, self.num_global_steps, self.parallel.world_size
        for field, steps in (("trace_steps", debug.traced), ("profile_steps", debug.profiled)):
            if steps and steps[-1] >= num_steps:
                raise ValueError(
                    f"debug.{field} = {getattr(debug, field)}: the run has global steps 0 to {num_steps - 1}; give "
                    "some of these, or raise num_global_steps"
                )
        if debug.profile_steps and (beyond := [rank for rank in debug.profile_ranks if rank >= num_ranks]):
            raise UserError(
                f"debug.profile_ranks: the mesh has ranks 0 to {num_ranks - 1}, but not {beyond[0]}; remove it"
            )

    def _servers_are_reached(self) -> None:
        if self.publish.transport == "shared_memory" and self.server.urls:
            raise ValueError(
                "publish.transport = shared_memory with server.urls: the trainer can share memory only with servers "
                "that the run starts on its machine; set it to broadcast or disk, or remove server.urls"
            )

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
    where = ".".join(str(part) for part in entry["loc"]) or "run"
    shown = "" if isinstance(entry["input"], dict | Section) else f" (got {entry['input']!r})"
    return f"{where}: {entry['msg'].removeprefix('Value error, ')}{shown}{_similar_choice(entry)}"


def _similar_choice(entry: Any) -> str:
    """A hint at the permitted values that are most similar to the given one, if the permitted values are a list."""
    context = entry.get("ctx", {})
    choices = re.findall(r"'([^']+)'", str(context.get("expected") or context.get("expected_tags") or ""))
    given = context.get("tag", entry["input"])
    return did_you_mean(given, choices) if isinstance(given, str) else ""


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
        raise UserError(f"objective.name: {entry['msg']}{_similar_choice(entry)}" for entry in error.errors()) from None
