"""The rules between the sections of a run's settings. Each function raises ValueError, with fields, values, rule and
remedy, for sections that do not fit each other; the rules within a section are in the section's own file."""

from minpro_megatron.config.alarms import AlarmsConfig
from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.debug import DebugConfig
from minpro_megatron.config.environment import EnvironmentConfig
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.model import ModelConfig, layer_backend_of
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.errors import UserError


def batches_fit(batch: BatchConfig, parallel: ParallelConfig, sampling: SamplingConfig, loss: LossConfig) -> None:
    """A step is a whole number of updates, the longest sequence fits in a row, and every data-parallel rank has one."""
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
    penalty = loss.overlong_penalty
    if penalty.enabled and penalty.buffer_tokens > sampling.max_response_tokens:
        raise ValueError(
            f"loss.overlong_penalty.buffer_tokens = {penalty.buffer_tokens} must not exceed "
            f"sampling.max_response_tokens = {sampling.max_response_tokens}: lower it"
        )


def episodes_can_be_sampled(environment: EnvironmentConfig, sampling: SamplingConfig, data: DataConfig) -> None:
    """An environment has turns and a template for its answers."""
    turns = sampling.max_turns
    if environment.enabled != (turns > 1):
        raise ValueError(
            f"sampling.max_turns = {turns} with environment.name = {environment.name}: without an environment a "
            "response has one turn, and with one the policy needs at least 2 to read an answer; set both"
        )
    if environment.enabled and not data.chat_template:
        raise ValueError(
            f"environment.name = {environment.name} needs data.chat_template = true: the template's markers of a "
            "turn surround the environment's answers; set it, or environment.name to none"
        )


def routes_can_be_replayed(
    model: ModelConfig,
    staleness: StalenessConfig,
    publish: PublishConfig,
    checkpoint: CheckpointConfig,
    alarms: AlarmsConfig,
) -> None:
    """The recorded routes are those of the weights that they are replayed for."""
    is_bounded, replay = staleness.mode == "bounded", model.routing_replay
    if replay == "rollout" and is_bounded and publish.pause_mode == "retract":
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
    if staleness.delay_steps and (checkpoint.saves_before_end or alarms.stop_on):
        raise ValueError(
            "model.routing_replay = scored: checkpoints do not hold the routes of batches scored with earlier "
            "weights; set checkpoint.every_steps and checkpoint.every_minutes to 0 and alarms.stop_on to [], or "
            "model.routing_replay to rollout or none"
        )


def supports_can_be_replayed(sampling: SamplingConfig, server: ServerConfig) -> None:
    """The servers report as many kept ids as they sample from."""
    given = {name.replace("-", "_"): value for name, value in server.arguments.items()}
    limit, top_k = given.get("sampling_mask_max_tokens"), sampling.top_k
    if top_k and isinstance(limit, int) and limit < top_k:
        raise ValueError(
            f"server.arguments: sampling_mask_max_tokens = {limit} must be at least sampling.top_k = {top_k}, and "
            "higher because equally likely tokens are kept together; raise it, or lower sampling.top_k"
        )


def runs_on_device(device: str, model: ModelConfig, optimizer: OptimizerConfig) -> None:
    """The layers and the optimizer exist for the device and the dtype."""
    if device == "cpu" and model.dtype != "float32":
        raise ValueError(f"model.dtype = {model.dtype} needs device = cuda; set model.dtype to float32")
    attention = model.attention_backend
    if attention != "auto" and layer_backend_of(model.backend, device, model.dtype) == "torch":
        raise ValueError(
            f"model.attention_backend = {attention} selects kernels of Transformer Engine, and the layers are "
            "torch's (model.backend, device and model.dtype decide this); set it to auto"
        )
    if device == "cuda" and model.dtype == "bfloat16":
        return
    if model.backend == "transformer_engine":
        raise ValueError(
            "model.backend = transformer_engine needs device = cuda and model.dtype = bfloat16, because its "
            "attention on packed rows does not support float32; set model.backend to auto or torch"
        )
    if optimizer.cpu_offload:
        raise ValueError(
            f"optimizer.cpu_offload = {optimizer.cpu_offload} moves the float32 state of bfloat16 weights "
            "from a GPU to its host: it needs device = cuda and model.dtype = bfloat16; set it to 0"
        )


def turns_are_possible(
    staleness: StalenessConfig, server: ServerConfig, publish: PublishConfig, device: str, parallel: ParallelConfig
) -> None:
    """Trainer and servers can take turns on the same GPUs."""
    remedy = "or set server.placement to disaggregated"
    if staleness.mode != "delay":
        raise ValueError(
            f"server.placement = shared with staleness.mode = {staleness.mode}: in bounded mode the servers "
            "never stop sampling, and so never release their memory; set staleness.mode to delay, " + remedy
        )
    if server.urls:
        raise ValueError(
            "server.placement = shared with server.urls: the run has to start and stop the servers that use its "
            "GPUs; remove server.urls, " + remedy
        )
    if device != server.device:
        raise ValueError(
            f"server.placement = shared with device = {device} and server.device = {server.device}: trainer "
            "and servers then have nothing to share; set both to the same, " + remedy
        )
    if device == "cpu":
        return
    if publish.transport == "broadcast":
        raise ValueError(
            "server.placement = shared with publish.transport = broadcast: NCCL refuses a group with two members "
            "on one GPU; choose another transport, " + remedy
        )
    needed, ranks = server.count * server.tensor_parallel, parallel.world_size
    if needed > ranks:
        raise ValueError(
            f"server.placement = shared: server.count x server.tensor_parallel = {needed} exceeds the trainer's "
            f"{ranks} GPUs; lower one of them, " + remedy
        )


def watched_parts_exist(debug: DebugConfig, num_steps: int, parallel: ParallelConfig) -> None:
    """The run has the steps and the ranks that are traced and profiled."""
    num_ranks = parallel.world_size
    for field, steps in (("trace_steps", debug.traced), ("profile_steps", debug.profiled)):
        if steps and steps[-1] >= num_steps:
            raise ValueError(
                f"debug.{field} = {getattr(debug, field)}: the run has global steps 0 to {num_steps - 1}; give "
                "some of these, or raise num_global_steps"
            )
    if debug.profile_steps and (beyond := [rank for rank in debug.profile_ranks if rank >= num_ranks]):
        raise UserError(f"debug.profile_ranks: the mesh has ranks 0 to {num_ranks - 1}, but not {beyond[0]}; remove it")


def servers_are_reached(publish: PublishConfig, server: ServerConfig) -> None:
    """The servers are where the publication's transport reaches."""
    if publish.transport == "shared_memory" and server.urls:
        raise ValueError(
            "publish.transport = shared_memory with server.urls: the trainer can share memory only with servers "
            "that the run starts on its machine; set it to broadcast or disk, or remove server.urls"
        )
