"""LlamaStage: some consecutive layers of a Llama, for a model whose layers are shared out among ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.options import LayerOptions
from octavo_engine.layers.rotary import rope_table
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama, LlamaLayer
from octavo_engine.quant.base import WeightSlot
from octavo_engine.runner.model_input import ModelInput


class LlamaStage(Llama):
    """Layers of a Llama, with the embedding if they are its first, with the final norm and the head if its last.

    What another stage has is on the device `meta` here: it has its sizes, and takes no memory.

    Args:
        config: of the whole model.
        options: how the weights are made; they are not initialised.
        layers: which of the model's layers are here; not empty.
        layer_class: what they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: LayerOptions,
        layers: range,
        layer_class: type[LlamaLayer] = LlamaLayer,
    ) -> None:
        self.config = config
        self.layer_class = layer_class
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_layers
        self._first_layer = layers.start
        self._has_embedding = self.is_first or (self.is_last and config.tie_word_embeddings)
        elsewhere = LayerOptions(options.dtype, torch.device("meta"))
        at_end = options if self.is_last else elsewhere
        cos_sin = rope_table(config.rope, config.head_dim, config.max_position_embeddings, options.device)
        self.embedding = Embedding(
            config.vocab_size, config.hidden_size, options=options if self._has_embedding else elsewhere
        )
        self.layers = [layer_class(config, i, cos_sin, options=options) for i in range(len(layers))]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options=at_end)
        self.head = LMHead(self.embedding, tied=config.tie_word_embeddings, options=at_end)
        self.num_parameters = sum(slot.num_parameters for slot in self.slots())

    def __call__(self, model_input: ModelInput) -> Tensor:  # noqa: ARG002
        """Refuse: a stage alone makes no hidden states of tokens."""
        raise TypeError("a stage goes on from what the stage before it made; use advance")

    def advance(self, model_input: ModelInput, residual: Tensor | None) -> Tensor:
        """Return what these layers make of what those before them made, both [num_tokens, hidden_size].

        Args:
            model_input: of the step.
            residual: what the layers before left, overwritten; None in the first stage, which begins with the tokens.

        Returns:
            In the last stage the last hidden states, after the final norm; else the residual, for the next stage.
        """
        if residual is None:
            residual = self.embedding(model_input.token_ids)
        x = self.layers[0].attention_norm(residual)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            x = layer.mlp(layer.mlp_norm.add(layer.attention(x, model_input), residual))
            if following is not None:
                x = following.attention_norm.add(x, residual)
        return self.norm.add(x, residual) if self.is_last else residual.add_(x)

    def slots(self) -> Iterator[WeightSlot]:
        """Yield where each tensor of a checkpoint goes that this stage keeps."""
        if self._has_embedding:
            yield from self.embedding.slots("model.embed_tokens")
        for index, layer in enumerate(self.layers, self._first_layer):
            yield from layer.slots(f"model.layers.{index}.")
        if self.is_last:
            yield from self.norm.slots("model.norm")
            yield from self.head.slots("lm_head")

    def finish(self) -> None:
        """Prepare the filled weights for products; there are no slots to fill afterwards."""
        for layer in self.layers:
            layer.finish()
        if self._has_embedding:
            self.embedding.finish()
        if self.is_last:
            self.head.finish()
