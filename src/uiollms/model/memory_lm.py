"""The memory-enhanced transformer: one frozen base in two roles, encoder and decoder.

    encode   token ids of chunks        -> memory: for every layer, m vectors of each chunk
    project  memory                     -> the keys and values that later chunks read, through the
                                           decoder's own LoRA
    decode   a chunk, keys and values   -> hidden states
    forward  a stream of tokens         -> logits; every chunk is compressed once it is full

Shapes: B documents, T tokens, C chunks, l chunk_size, m num_memory, L layers, D hidden size, H
key/value heads, K head size, M memory slots that a row reads, V vocabulary. Source: UIO-LLMs
(arXiv 2406.18173) sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    locked_if_offloaded,
    to_device,
)
from uiollms.kernels.execution import Execution
from uiollms.kernels.norms import promote_norms
from uiollms.kernels.quantized import keep_differentiable
from uiollms.model.attention import AttentionPattern
from uiollms.model.configuration import MemoryLMConfig, register_auto_classes
from uiollms.model.generation import Generation
from uiollms.model.layers import (
    AnyPrefix,
    compiled_layer,
    decoder_inputs,
    encoder_inputs,
    layer_device,
    project_kv,
    run_encoder_layer,
    run_layer,
)
from uiollms.model.lora import master_dtype
from uiollms.model.positions import slot_positions
from uiollms.model.pretrained import PretrainedMixin
from uiollms.model.roles import Role, check_base
from uiollms.model.rope import (
    describe_num_positions,
    num_positions,
    rotary_tables,
    uses_long_factors,
)
from uiollms.model.skeleton import make_skeleton
from uiollms.model.state import KVPrefix
from uiollms.model.streaming import Streaming
from uiollms.weights.fitness import check_tensors, first_eos, not_finite

LayerMemory = list[Tensor]  # L tensors [C, m, D], each on its layer's device
Move = Callable[[Tensor, torch.device], Tensor]


class MemoryLM(  # type: ignore[misc]
    PretrainedMixin, Streaming, Generation, PreTrainedModel, GenerationMixin
):
    """A Hugging Face causal LM with learned memory.

    base: a loaded model of a supported family (Llama, SmolLM2, Mistral, Qwen2, Qwen3). It is
    frozen and shared, not copied; a float64 base also gets float64 norms (see `promote_norms`).
    masters: "fp32" or "base", see `lora.master_dtype`. Raises ValueError for another family, for
    a sliding window narrower than a chunk, and for what else `roles.check_base` refuses.

    Attributes that may be set: chunk_batch (4): how many chunks are encoded, or rows decoded, in
    one batch with a graph. checkpointing (False): the backward pass runs the forward pass of a
    layer again instead of saving its activations. pipeline (False): in a training step the devices
    of a base that is on several work on successive batches at the same time. All three trade memory
    for speed and do not change the results. compile_encoder (False): torch.compile compiles the
    encoder's layers, which changes results by rounding. Raises ValueError with LoRA dropout and
    with weights on disk, when a chunk is encoded.
    """

    config_class = MemoryLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, base: Any, config: MemoryConfig, masters: str = "fp32") -> None:
        check_base(base, config)
        super().__init__(
            MemoryLMConfig(
                text_config=base.config,
                memory=config.model_dump(exclude={"schema_"}),
                attn_implementation=base.config._attn_implementation,
            )
        )
        base.requires_grad_(False)
        base.eval()
        keep_differentiable(base)
        if base.dtype == torch.float64:
            promote_norms(base)
        self.base: Any = base
        self.memory_config = config
        self.generation_config = base.generation_config
        self.chunk_batch = 4
        self.checkpointing = False
        self.pipeline = False
        self.compile_encoder = False
        embedding = base.model.embed_tokens
        with align_module_device(embedding):  # its weights may be on disk
            token = embedding.weight.detach()[first_eos(base.config)].to(
                master_dtype(base.dtype, masters)
            )[None, None]
        self.masters = masters
        self.master_dtype = token.dtype  # of trained parameters and of sums of gradients
        learned = config.slot_input == "token"
        self.encoder = Role("encoder", base, config, "retrieval_token" if learned else None, token)
        self.decoder = Role("decoder", base, config, "repeat_token", token)
        # The skeletons are not submodules, see model/skeleton.py.
        self.encoder_layers = make_skeleton(base, list(self.encoder.layers))  # type: ignore[arg-type]
        self.decoder_layers = make_skeleton(base)
        self.has_offloaded_weights = has_offloaded_weights(base)

    # ---- trained parameters ----------------------------------------------------------------------

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Returns name -> parameter, with the names of `memory_state_dict`. Gradients arrive in
        their `.grad`.

        The encoder LoRA of the last layer is listed, as in the authors' checkpoints, but never
        gets a gradient, because nothing reads the outputs of that layer.
        """
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def memory_state_dict(self) -> dict[str, Tensor]:
        """Returns the trained parameters, detached:
        `encoder.layers.{i}.{q_proj,v_proj}.lora_{A,B}`,
        `decoder.layers.{i}.{k_proj,v_proj}.lora_{A,B}`, `encoder.retrieval_token` (not with
        `slot_input` "last") and `decoder.repeat_token`."""
        return {name: p.detach() for name, p in self.trainable_parameters().items()}

    def load_memory_state_dict(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copies `tensors` into the trained parameters and converts their dtype.

        With `strict` it raises ValueError that lists every missing, unknown or misshapen tensor;
        without, it ignores missing and unknown ones. It raises ValueError if a tensor contains NaN
        or infinite numbers. If it raises, it has copied nothing.
        """
        parameters = self.trainable_parameters()
        check_tensors(tensors, parameters, strict)
        # Numbers are checked in the model's dtype, because float16 ends at 65504.
        converted = {
            name: tensors[name].to(parameters[name].dtype)
            for name in parameters.keys() & tensors.keys()
        }
        if name := not_finite(sorted(converted.items())):
            dtype = parameters[name].dtype
            raise ValueError(f"{name} holds NaN or infinite numbers in {dtype}")
        with torch.no_grad():
            for name, tensor in converted.items():
                parameters[name].copy_(tensor)

    def train(self, mode: bool = True) -> MemoryLM:
        """Sets the mode as nn.Module does, except that the frozen base stays in evaluation mode.
        With dropout in the base, encoding a chunk again would differ from the first time."""
        super().train(mode)
        self.base.eval()
        return self

    # ---- sizes -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the token embedding, to which token ids are moved."""
        return device_of(self.base.model.embed_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base, in which everything is computed except for trained parameters
        and sums of gradients."""
        return self.base.dtype

    @property
    def capacity(self) -> int:
        """The number of tokens of the longest document that the base's positions allow."""
        return self.limits.capacity

    @property
    def limits(self) -> Limits:
        """The limits of a document's size."""
        config = self.base.config
        return Limits(
            self.memory_config,
            num_positions(config),
            describe_num_positions(config),
            config.vocab_size,
        )

    @property
    def chunks_per_batch(self) -> int:
        """How many chunks are encoded in one batch: `chunk_batch`. Where no graph is built it is
        twice that, up to 4, because a graph holds the activations of all layers, and without one
        only those of one layer exist at a time."""
        if torch.is_grad_enabled() or self.checkpointing:
            return self.chunk_batch
        return max(self.chunk_batch, min(4, 2 * self.chunk_batch))

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError if a document of `num_tokens` tokens exceeds the capacity."""
        check_length(num_tokens, self.limits)

    def execution(self, length: int, as_base: bool = False) -> Execution:
        """Chooses how one pass over rows of `length` tokens executes its layers. as_base: with the
        kernels that the base itself would use, so that results are equal to the bit.

        Only lengths that occur in every document are worth oneDNN's memory for a shape.
        """
        config, l = self.memory_config, self.memory_config.chunk_size
        common_lengths = (1, l, l + config.recent_tokens, l + config.num_memory)
        return Execution(
            onednn=length in common_lengths and not as_base,
            checkpointing=self.checkpointing,
            locked=self.has_offloaded_weights,
        )

    # ---- encoder and transfer head ---------------------------------------------------------------

    def encode(self, input_ids: Tensor) -> Tensor:
        """Compresses chunks [C, l] of token ids to memory [L, C, m, D] on the first layer's device.
        Builds no graph unless grad is enabled."""
        memory = self.encode_layers(input_ids)
        return torch.stack([layer.to(memory[0].device) for layer in memory])

    @locked_if_offloaded
    def encode_layers(
        self, input_ids: Tensor, seeds: Sequence[int] | None = None, move: Move = to_device
    ) -> LayerMemory:
        """Compresses chunks [C, l] of token ids, which do not see each other, to the memory of
        every layer, on that layer's device. `seeds`, one for each chunk, switch LoRA dropout on.
        `move` is called before every layer and returns the hidden states on the layer's device.

        The memory of a layer is the input of its attention at the memory slots. So of the last
        layer only the input norm runs: nothing reads the results of its attention and MLP, of the
        final norm and of the LM head. Of the layer before it, only the slots are run.
        """
        l, m = self.memory_config.chunk_size, self.memory_config.num_memory
        if input_ids.shape[1] != l:
            raise ValueError(
                f"encode takes chunks of chunk_size {l} tokens, found {list(input_ids.shape)}"
            )
        if self.compile_encoder and (seeds is not None or self.has_offloaded_weights):
            raise ValueError(
                "compile_encoder works neither with LoRA dropout nor with weights on disk; set "
                "model.compile_encoder = False"
            )
        tokens = self.base.model.embed_tokens(to_device(input_ids, self.device))
        if self.memory_config.slot_input == "last":
            slots = tokens[:, l // m - 1 :: l // m]  # l 8, m 2 -> tokens 3 and 7
        else:
            token = self.encoder.get_parameter("retrieval_token").to(tokens)
            slots = token.expand(len(input_ids), m, -1)
        hidden = torch.cat([tokens, slots], dim=1)  # [C, l + m, D]
        inputs = encoder_inputs(self.base, hidden, self.memory_config)
        execution = self.execution(hidden.shape[1])
        memory, last = [], len(self.encoder_layers) - 1
        for i, layer in enumerate(self.encoder_layers):
            hidden, inputs = move(hidden, layer_device(layer)), inputs.to(layer_device(layer))
            memory.append(layer.input_layernorm(hidden[:, -m:]))
            if i == last:
                break
            if self.compile_encoder and i < last - 1:
                run = partial(compiled_layer(), layer, inputs=inputs)
                hidden = replace(execution, onednn=False).run(layer, run, hidden)
                continue
            run = partial(
                run_encoder_layer,
                layer,
                seeds=seeds,
                inputs=inputs,
                num_memory=m if i == last - 1 else None,
            )
            hidden = execution.run(layer, run, hidden)
        return memory

    @locked_if_offloaded
    def project(
        self, memory: LayerMemory, chunks: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Projects the memory of chunks, L tensors [C, m, D], to keys and values, L tensors [C, H,
        m, K] each. `chunks` are the numbers of the chunks in their document: slot j of chunk c is
        rotated to position c * m + j. A slot's position never changes, so this is done once.

        The projections are the base's, with the decoder's LoRA unless `transfer_head` is off, see
        `layers.project_kv`.
        """
        m = self.memory_config.num_memory
        positions = slot_positions(chunks, m, self.device)
        like = torch.empty(0, dtype=memory[0].dtype, device=self.device)
        long_factors = uses_long_factors(
            self.base.config, [m], 0
        )  # as for every row that reads slots
        rotary = rotary_tables(self.base, like, positions, long_factors)
        keys, values = [], []
        layers: Iterator[Any] = zip(self.decoder_layers, self.decoder.layers, memory, strict=True)
        for layer, loras, slots in layers:
            rotary = tuple(to_device(table, layer_device(layer)) for table in rotary)
            k, v = project_kv(layer.self_attn, slots, rotary, loras, seeds)
            keys.append(k)
            values.append(v)
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
        move: Move = to_device,
    ) -> Tensor:
        """Runs the decoder on tokens [B, T] that read `prefix`. Returns the normed hidden states
        [B, T, D], the inputs of the LM head.

        num_slots: how many slots of the prefix each row reads, which is also the position of the
        row's first token (or of its first recent token). local_past: how many tokens of the same
        row the prefix contains. repeat: [B] bool; in these rows the `repeat_token` embedding
        replaces the first token's. first_slots: the first slot that each row reads, by default
        0; it is greater for the later ones of several documents whose memories are joined.
        pattern: replaces the attention pattern that prefix and base call for. move: is called
        before every layer and the final norm, and returns the hidden states on their device.

        Tokens pass through frozen weights only. The hidden states of a text without memory are
        equal to the base's, to the bit.
        """
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
        as_base = not any(num_slots) and local_past == 0
        execution = self.execution(hidden.shape[1], as_base)
        for layer in self.decoder_layers:
            hidden, inputs = move(hidden, layer_device(layer)), inputs.to(layer_device(layer))
            run = partial(run_layer, layer, inputs=inputs, prefix=prefix)
            hidden = execution.run(layer, run, hidden)
        return self.base.model.norm(move(hidden, device_of(self.base.model.norm)))

    @locked_if_offloaded
    def logits(self, hidden: Tensor, as_base: bool = False) -> Tensor:
        """Applies the LM head: [B, T, D] -> [B, T, V]. as_base: see `execution`."""
        head = self.base.lm_head
        execution = self.execution(hidden.shape[1], as_base)
        return execution.run(head, head, to_device(hidden, device_of(head)))

    @contextmanager
    def sized(self, size: tuple[int, int] | None) -> Iterator[None]:
        """Sets (chunk_size, num_memory) inside the context, in place of the compressor config's.
        The weights do not depend on them. None changes nothing."""
        config = self.memory_config
        if size is not None:
            chunk_size, num_memory = size
            self.memory_config = config.model_copy(
                update=dict(chunk_size=chunk_size, num_memory=num_memory)
            )
        try:
            yield
        finally:
            self.memory_config = config

    def reconstruct(self, input_ids: Tensor) -> Tensor:
        """Computes the logits [C, l, V] of auto-encoding chunks [C, l] (paper Table 1). Each chunk
        is compressed. The decoder, started by the `repeat_token` embedding, then predicts every
        token from the chunk's own memory and the true tokens before it."""
        keys, values = self.project(self.encode_layers(input_ids), [0] * len(input_ids))
        shifted = F.pad(input_ids[:, :-1], (1, 0))
        prefix = KVPrefix([[k] for k in keys], [[v] for v in values])
        repeat = torch.ones(len(input_ids), dtype=torch.bool)
        num_slots = [self.memory_config.num_memory] * len(input_ids)
        return self.logits(self.decode(shifted, prefix, num_slots, repeat=repeat))


register_auto_classes(MemoryLM)
