"""The memory-enhanced transformer: one frozen base, an encoder role and a decoder role.

    encode   chunk token ids            -> memory, for every layer the vectors a chunk leaves behind
    project  memory                     -> keys and values in front of later chunks, through the
                                           decoder's own LoRA
    decode   chunk + keys and values    -> hidden states
    forward  a stream of tokens         -> logits, compressing every chunk that fills up

Shapes: B documents, T tokens, C chunks, l chunk_size, m num_memory, L layers, D hidden size, H
key/value heads, K head size, M memory slots in front, V vocabulary. Source: UIO-LLMs (arXiv
2406.18173) sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel

from uiollms.config.sections import MemoryConfig
from uiollms.data.limits import Limits, check_length
from uiollms.kernels.devices import (
    device_of,
    has_offloaded_weights,
    locked,
    locked_if_offloaded,
    to_device,
)
from uiollms.kernels.frozen_linear import use_onednn
from uiollms.kernels.norms import promote_norms
from uiollms.model.attention import AttentionPattern
from uiollms.model.generation import Generation
from uiollms.model.layers import (
    AnyPrefix,
    Role,
    check_base,
    checkpointed,
    decoder_inputs,
    encoder_inputs,
    keys_and_values,
    layer_device,
    recompute_silu,
    rotate,
    run_encoder_layer,
    run_layer,
)
from uiollms.model.lora import master_dtype
from uiollms.model.positions import describe_positions, find_long_rows, num_positions, rotary_tables
from uiollms.model.pretrained import PretrainedMixin
from uiollms.model.skeleton import skeleton
from uiollms.model.state import KVPrefix
from uiollms.model.streaming import Streaming
from uiollms.weights.fitness import check_tensors, eos_of, not_finite

LayerMemory = list[Tensor]  # L tensors [C, m, D], each on its layer's device


class MemoryLM(  # type: ignore[misc]
    PretrainedMixin, Streaming, Generation, PreTrainedModel, GenerationMixin
):
    """A Hugging Face causal LM with learned memory.

    base: a loaded model of a supported family (Llama, SmolLM2, Mistral, Qwen2, Qwen3). It is
    frozen and shared, not copied; a float64 base also gets float64 norms (see `promote_norms`).
    masters: "fp32" or "base", see `lora.master_dtype`. Raises ValueError, naming what was found
    and what is allowed, for another family or for a sliding window narrower than a chunk.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, base: Any, config: MemoryConfig, masters: str = "fp32") -> None:
        check_base(base, config)
        super().__init__(base.config)
        base.requires_grad_(False)
        base.eval()
        if base.dtype == torch.float64:
            promote_norms(base)
        self.base: Any = base
        self.memory_config = config
        self.generation_config = base.generation_config
        # Chunks encoded or decoded in one batch with a graph: memory against speed, never results.
        self.chunk_batch = 4
        # A backward runs a layer's forward again instead of keeping what happened inside it: memory
        # against time.
        self.checkpointing = False
        embedding = base.model.embed_tokens
        with align_module_device(embedding):  # it may rest on disk
            token = embedding.weight.detach()[eos_of(base.config)].to(
                master_dtype(base.dtype, masters)
            )[None, None]
        self.masters, self.master_dtype = (
            masters,
            token.dtype,
        )  # of what is trained, and of gradients' sums
        learned = config.slot_input == "token"
        self.encoder = Role("encoder", base, config, "retrieval_token" if learned else None, token)
        self.decoder = Role("decoder", base, config, "repeat_token", token)
        # What runs, beside the module tree (see model/skeleton.py).
        self.encoder_layers = skeleton(base, list(self.encoder.layers))  # type: ignore[arg-type]
        self.decoder_layers = skeleton(base)
        self.has_offloaded_weights = has_offloaded_weights(
            base
        )  # weights are loaded into modules for the time of a call: one thread at a time

    # ---- what is trained -------------------------------------------------------------------------

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, as in `memory_state_dict`; gradients arrive in their `.grad`.

        The last layer's encoder LoRA is listed (the authors' checkpoints hold it) and never gets
        a gradient: nothing reads what it would change.
        """
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def memory_state_dict(self) -> dict[str, Tensor]:
        """What is trained, detached: `encoder.layers.{i}.{q_proj,v_proj}.lora_{A,B}`,
        `decoder.layers.{i}.{k_proj,v_proj}.lora_{A,B}`, `encoder.retrieval_token` (not under
        `slot_input` "last"), `decoder.repeat_token`."""
        return {name: p.detach() for name, p in self.trainable_parameters().items()}

    def load_memory_state_dict(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy `tensors` into the trained parameters, converting dtype. With `strict`, a
        missing, unknown or misshapen tensor raises ValueError that lists them all; without,
        missing and unknown ones are left alone. A tensor that holds NaN or infinite numbers
        raises ValueError and nothing is copied."""
        own = self.trainable_parameters()
        check_tensors(tensors, own, strict)
        # In the model's own dtype: float16 has no numbers past 65504.
        fitting = {name: tensors[name].to(own[name].dtype) for name in own.keys() & tensors.keys()}
        if name := not_finite(sorted(fitting.items())):
            raise ValueError(f"{name} holds NaN or infinite numbers in {own[name].dtype}")
        with torch.no_grad():
            for name, tensor in fitting.items():
                own[name].copy_(tensor)

    def train(self, mode: bool = True) -> MemoryLM:
        """As nn.Module's, except that the frozen base stays in evaluation mode: a base with
        dropout of its own would make the re-run of a chunk differ from its first run."""
        super().train(mode)
        self.base.eval()
        return self

    # ---- sizes -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return device_of(self.base.model.embed_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The base's, in which all but the trained parameters are computed."""
        return self.base.dtype

    @property
    def capacity(self) -> int:
        """Tokens of the longest document that the base's positions allow."""
        return self.limits.capacity

    @property
    def limits(self) -> Limits:
        """What a document can have at most."""
        positions, said = num_positions(self.config), describe_positions(self.config)
        return Limits(self.memory_config, positions, said, self.config.vocab_size)

    @property
    def chunks_per_batch(self) -> int:
        """`chunk_batch`; without a graph, which keeps of every layer what is otherwise held of
        one, twice as many if up to 4."""
        return max(
            self.chunk_batch,
            0 if torch.is_grad_enabled() or self.checkpointing else min(4, 2 * self.chunk_batch),
        )

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError for a document of `num_tokens` tokens that is past the capacity."""
        check_length(num_tokens, self.limits)

    # ---- encoder and transfer head ---------------------------------------------------------------

    def encode(self, input_ids: Tensor) -> Tensor:
        """[C, l] token ids -> memory [L, C, m, D], on the first layer's device. No graph unless
        grad is enabled."""
        memory = self.encode_layers(input_ids)
        return torch.stack([layer.to(memory[0].device) for layer in memory])

    @locked_if_offloaded
    def encode_layers(self, input_ids: Tensor, seeds: Sequence[int] | None = None) -> LayerMemory:
        """As `encode`, layer by layer, every layer's memory on that layer's device; `seeds`, one
        a chunk, switch LoRA dropout on. Chunks do not see each other.

        The memory of a layer is what its attention would receive at the memory positions, so the
        last layer runs only its input norm: its attention and MLP, the final norm and the LM
        head have no reader. Of the layer before it only the slots are read: there the chunk's
        tokens become keys and values, and nothing more.
        """
        l, m = self.memory_config.chunk_size, self.memory_config.num_memory
        if input_ids.shape[1] != l:
            raise ValueError(
                f"encode takes chunks of chunk_size {l} tokens, found {list(input_ids.shape)}"
            )
        tokens = self.base.model.embed_tokens(to_device(input_ids, self.device))
        if self.memory_config.slot_input == "last":
            slots = tokens[:, l // m - 1 :: l // m]  # l 8, m 2 -> tokens 3 and 7
        else:
            token = self.encoder.get_parameter("retrieval_token").to(tokens)
            slots = token.expand(len(input_ids), m, -1)
        hidden = torch.cat([tokens, slots], dim=1)  # [C, l + m, D]
        inputs = encoder_inputs(self.base, hidden, self.memory_config)
        memory, count = [], len(self.encoder_layers)
        for i, layer in enumerate(self.encoder_layers):
            hidden, inputs = to_device(hidden, layer_device(layer)), inputs.to(layer_device(layer))
            memory.append(layer.input_layernorm(hidden[:, -m:]))
            if i + 1 < count:
                rows = m if i + 2 == count else None
                run = partial(run_encoder_layer, layer, seeds=seeds, inputs=inputs, rows=rows)
                hidden = self._run(layer, run, hidden)
        return memory

    def _run(
        self,
        module: Any,
        function: Callable[[Tensor], Tensor],
        hidden: Tensor,
        as_base: bool = False,
    ) -> Tensor:
        """A module's function on [B, T, D]; with a graph where grad is enabled. as_base: by the
        kernels that the base itself takes, to the bit."""
        config, l = self.memory_config, self.memory_config.chunk_size
        shared_lengths = (1, l, l + config.recent_tokens, l + config.num_memory)
        if (
            hidden.device.type == "cpu" and hidden.shape[1] in shared_lengths and not as_base
        ):  # see kernels/frozen_linear.py
            function = use_onednn(function, module)
        if self.has_offloaded_weights:  # here too: a backward may run the function again
            function = locked(function)
        run = checkpointed if self.checkpointing else recompute_silu
        return run(function, hidden) if torch.is_grad_enabled() else function(hidden)

    @locked_if_offloaded
    def project(
        self, memory: LayerMemory, chunks: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Memory (L tensors [C, m, D]) of the document's chunks number `chunks` -> keys and
        values, L tensors [C, H, m, K] each: frozen projection + decoder LoRA (unless
        transfer_head is off), the family's key norm if it has one, RoPE at the slots' positions
        `chunk * m .. chunk * m + m - 1`. A slot's position never changes, so this is done once."""
        m = self.memory_config.num_memory
        positions = torch.tensor(chunks)[:, None] * m + torch.arange(m)
        like = torch.empty(
            0, dtype=memory[0].dtype, device=self.device
        )  # the table is where the tokens are
        far = find_long_rows(self.config, [m], 0)  # whoever reads slots
        rotary = rotary_tables(self.base, like, to_device(positions, self.device), far)
        keys, values = [], []
        layers: Iterator[Any] = zip(self.decoder_layers, self.decoder.layers, memory, strict=True)
        for layer, pair, slots in layers:
            k, v = keys_and_values(layer.self_attn, pair, slots, seeds)
            rotary = tuple(to_device(r, k.device) for r in rotary)
            keys.append(rotate(layer.self_attn, k.transpose(1, 2), rotary))
            values.append(v.transpose(1, 2))
        return keys, values

    # ---- decoder ---------------------------------------------------------------------------------

    @locked_if_offloaded
    def decode(
        self,
        input_ids: Tensor,
        prefix: AnyPrefix,
        num_slots: Sequence[int],
        local_past: int = 0,
        repeat: Tensor | None = None,
        first_slots: Sequence[int] | None = None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        """[B, T] tokens behind `prefix` -> normed hidden states [B, T, D], ready for the LM
        head.

        num_slots: how many of the prefix's slots each row sees, also the position where the row
        begins, with its recent tokens, if it has any; local_past: tokens of the same row already
        in the prefix; repeat: [B] bool, rows whose first token is replaced by the `repeat_token`
        embedding; first_slots: the number of the first slot that each row sees, where it is not
        0, as for the later ones of several documents whose memories stand behind each other;
        seen: what attends, in place of what is chosen for `prefix` and base. Ordinary tokens go
        through the frozen weights only; a text without memory is to the bit what the base makes
        of it.
        """
        as_base = not any(num_slots) and local_past == 0
        hidden = self.base.model.embed_tokens(to_device(input_ids, self.device))
        if repeat is not None:
            start = torch.where(
                to_device(repeat, self.device)[:, None],
                self.decoder.get_parameter("repeat_token")[0].to(hidden),
                hidden[:, 0],
            )
            hidden = torch.cat([start[:, None], hidden[:, 1:]], dim=1)
        inputs = decoder_inputs(
            self.base, hidden, num_slots, local_past, prefix, first_slots, pattern
        )
        for layer in self.decoder_layers:
            inputs = inputs.to(layer_device(layer))
            run = partial(run_layer, layer, inputs=inputs, prefix=prefix)
            hidden = self._run(layer, run, to_device(hidden, layer_device(layer)), as_base)
        return self.base.model.norm(to_device(hidden, device_of(self.base.model.norm)))

    @locked_if_offloaded
    def logits(self, hidden: Tensor, as_base: bool = False) -> Tensor:
        """[B, T, D] -> [B, T, V]; as_base: by the base's own kernel."""
        head = self.base.lm_head
        return self._run(head, head, to_device(hidden, device_of(head)), as_base)

    @contextmanager
    def sized(self, size: tuple[int, int] | None) -> Iterator[None]:
        """Inside, chunks have another chunk_size and num_memory than the compressor config's, of
        which the weights know nothing; None: the same."""
        own = self.memory_config
        if size is not None:
            self.memory_config = own.model_copy(
                update=dict(zip(("chunk_size", "num_memory"), size, strict=True))
            )
        try:
            yield
        finally:
            self.memory_config = own

    def reconstruct(self, input_ids: Tensor) -> Tensor:
        """Auto-encoding logits (paper Table 1): every chunk of [C, l] is compressed, then the
        decoder, started by the `repeat_token` embedding, predicts it from its own memory alone
        and the true tokens before: [C, l, V]."""
        keys, values = self.project(self.encode_layers(input_ids), [0] * len(input_ids))
        shifted = F.pad(input_ids[:, :-1], (1, 0))
        prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
        repeat, rows = (
            torch.ones(len(input_ids), dtype=torch.bool),
            [self.memory_config.num_memory] * len(input_ids),
        )
        return self.logits(self.decode(shifted, prefix, rows, repeat=repeat))
