"""config.json as published with the models that this project is for."""

from minpro_megatron.models.known_models.find import known_config

QWEN3_30B_A3B = known_config("qwen3-30b-a3b")
QWEN3_8B = known_config("qwen3-8b")
QWEN3_14B = known_config("qwen3-14b")
GLM_4_5_AIR = known_config("glm-4.5-air")
# Tied embeddings: 596,049,920 parameters.
QWEN3_0_6B = known_config("qwen3-0.6b")
