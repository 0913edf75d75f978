"""SEDAC: per-token early exit for decoder-only language models.

Importing this package imports nothing heavy; each module names what it needs:
`cli`, `settings`, `vllm_patch` the standard library; `probe`, `cascade`, `calibration`, `adapter` torch and numpy;
`gates`, what trains them (`distillation`, `gates_start`, `gates_training`) and `quality` torch and, to read and write
adapters, safetensors; `collection` and `demo_model` transformers; the runtimes torch, inside vLLM.
"""

__version__ = "0.1.0"
