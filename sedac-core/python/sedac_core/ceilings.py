"""What a model's step on a GPU reads and computes, and so the most that skipping or narrowing its MLPs can give."""

import statistics
from typing import Any

import torch

from .gates import GateShape


def attention_weights(config: dict[str, Any]) -> int:
    """How many weights the attention of one layer has."""
    hidden = config["hidden_size"]
    head = hidden // config["num_attention_heads"]
    return 2 * hidden * hidden + 2 * hidden * head * config["num_key_value_heads"]


class Shares:
    """What a model's step reads and computes: all of the MLPs and attention, in weights of so many bytes, and the LM head."""

    def __init__(self, config: dict[str, Any], runtime: Any, bandwidth: float, weight_bytes: int = 2):
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        self.mlp = 3 * hidden * config["intermediate_size"]
        self.attention = attention_weights(config)
        self.layers, self.skippable = layers, len(runtime.window)
        self.head, self.weight_bytes = hidden * config["vocab_size"], weight_bytes  # a head is not quantised
        self.bandwidth = bandwidth  # bytes a second
        self.skips = runtime.skips  # whether a step of so many tokens skips at all

    def bytes_read(self, batch: int, rate: float, pattern: str) -> float:
        """Weight bytes of a decode step: a skippable MLP is read unless all of its rows have exited."""
        idle = rate if pattern == "all_or_none" else rate**batch
        mlps = self.layers - idle * self.skippable
        return self.weight_bytes * (mlps * self.mlp + self.layers * self.attention) + 2.0 * self.head

    def ceiling(self, phase: str, size: int, rate: float, pattern: str) -> float:
        """The most that skipping can give: by bytes read in decode, by rows computed in prefill (attention's own
        products of tokens with tokens left out, and the LM head is one row)."""
        if phase == "decode":
            return self.bytes_read(size, 0, pattern) / self.bytes_read(size, rate, pattern)
        whole = self.layers * (self.mlp + self.attention)
        return whole / (whole - rate * self.skippable * self.mlp)


class GatedShares:
    """The same under gates."""

    def __init__(self, config: dict[str, Any], runtime: Any, bandwidth: float):
        self.shape: GateShape = runtime.policy.shape
        self.attention = attention_weights(config)
        self.other_bytes = 2.0 * (self.shape.num_layers * self.attention + config["hidden_size"] * config["vocab_size"])
        self.bandwidth, self.skips = bandwidth, runtime.skips

    def mlp_bytes(self, batch: int, rate: float | None, level: int) -> float:
        """Bytes of MLPs, adapters and gates that a decode step reads, None: of MLPs that run whole without a gate. Neurons
        past the width are read unless all rows have narrowed, an adapter where any row has."""
        shape = self.shape
        neurons, gate = float(shape.intermediate_size), 0.0
        if rate is not None:
            all_narrow, any_narrow = rate**batch, 1 - (1 - rate) ** batch
            least = neurons * (1 - shape.saved[level]) if shape.bits else shape.widths[level]
            neurons = all_narrow * least + (1 - all_narrow) * neurons + any_narrow * shape.adapter_rank
            gate = shape.gate_cost * 3 * shape.hidden_size * shape.intermediate_size * len(shape.leaders)
        return 2.0 * (3 * shape.hidden_size * neurons * shape.num_layers + gate)

    def ceiling(self, phase: str, size: int, rate: float, level: int) -> float:
        """The most that narrowing can give: by bytes read in decode, by neurons computed in prefill."""
        shape = self.shape
        if phase == "decode":
            whole = self.mlp_bytes(size, None, level) + self.other_bytes
            return whole / (self.mlp_bytes(size, rate, level) + self.other_bytes)
        mlp = 3 * shape.hidden_size * shape.intermediate_size
        saved = 0.0 if shape.bits else shape.saved[level]
        return (mlp + self.attention) / (mlp * (1 - rate * saved) + self.attention)


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written ones."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.numel() / statistics.median(times)
