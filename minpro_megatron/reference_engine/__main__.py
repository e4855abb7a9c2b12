"""A rollout server for tests and small studies: it runs on the CPU and samples the same tokens for the same seed.

    python -m minpro_megatron.reference_engine --model-path HF_DIR --port 30000

It implements the part of SGLang's HTTP interface that this project uses. It ends when its parent ends.
"""

import argparse
import logging
import os

import torch
from aiohttp import web

from minpro_megatron.command_line import Parser
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.reference_engine.engine import Engine
from minpro_megatron.reference_engine.model import Model
from minpro_megatron.reference_engine.server import Server
from minpro_megatron.serving.sglang_main import API_KEY_VARIABLE, end_with_parent

log = logging.getLogger(__name__)

# The trainer may train for this long between two requests on a connection; SGLang's 5 s are raised to the same limit.
KEEP_ALIVE_S = 600


def main() -> None:
    """Serve until a signal ends the process: there is nothing to save."""
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    arguments = _arguments()
    facts = read_model_facts(arguments.model_path)
    length = arguments.context_length or facts.max_position_embeddings
    model = Model.from_hf(read_architecture(arguments.model_path), arguments.model_path, length)
    engine = Engine(model, arguments.weight_version, arguments.max_running_requests)
    engine.start()
    api_key = os.environ.pop(API_KEY_VARIABLE, None)
    server = Server(engine, arguments.model_path, facts.stop_token_ids, length, api_key)
    log.info("serving %s at %s:%d", arguments.model_path, arguments.host, arguments.port)
    web.run_app(
        server.application(),
        host=arguments.host,
        port=arguments.port,
        print=None,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_S,
        handle_signals=False,
        handler_cancellation=True,  # a response is not sampled further once its client has disconnected
    )


def _arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minpro_megatron.reference_engine", description=__doc__)
    parser.add_argument("--model-path", required=True, help="Hugging Face folder of a Qwen3 or Qwen3-MoE")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--weight-version", default="0", help="the policy version of the folder's weights")
    parser.add_argument("--context-length", type=int, help="max. tokens of a sequence (default: the model's limit)")
    parser.add_argument("--max-running-requests", type=int, default=256, help="max. responses sampled in turn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
