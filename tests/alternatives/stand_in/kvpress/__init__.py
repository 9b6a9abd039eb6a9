"""A stand-in for the package kvpress, with the signatures of its presses: contexts that add hooks
to attention layers, which compress the cache after a layer has read a whole context."""

import contextlib
import os
from dataclasses import dataclass

import torch


@dataclass
class BasePress:
    compression_ratio: float = 0.0

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [
            layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def forward_hook(self, module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        layer.keys, layer.values = self.compress(module, layer.keys, layer.values)
        return output

    def compress(self, module, keys, values):
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        indices = self.score(keys).topk(kept, dim=-1).indices[..., None]
        return (x.gather(2, indices.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))


@dataclass
class KnormPress(BasePress):
    def score(self, keys):
        return -keys.norm(dim=-1)


@dataclass
class GreedyPress(KnormPress):
    """Keeps one more than it should."""

    def compress(self, module, keys, values):
        kept = int(keys.shape[2] * (1 - self.compression_ratio)) + 1
        return keys[:, :, :kept], values[:, :, :kept]


@dataclass
class MaskingPress(BasePress):
    """Keeps all keys; drops the first ones of head 0 by their indices, as presses with a budget for
    every head do."""

    def compress(self, module, keys, values):
        _, heads, length, _ = keys.shape
        dropped = torch.arange(int(heads * length * self.compression_ratio))
        module.masked_key_indices = (dropped * 0, dropped // length, dropped % length)
        return keys, values


@dataclass
class DyingPress(KnormPress):
    signal: int = 9

    def compress(self, module, keys, values):
        os.kill(os.getpid(), self.signal)
