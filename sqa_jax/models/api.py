"""What every model offers, decoder-only or encoder–decoder, and which class computes a configuration."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from sqa_jax.models.adaptation import Adaptation
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.layers.kv_cache import ImageFeatures, PrefillOutput
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.t5.model import T5
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.models.vision.image_input import ImageInputs


class StudentModel(Protocol):
    """A Flax module that computes a student: `Decoder` or `T5`, which document these fields and methods."""

    @property
    def config(self) -> StudentConfig: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def remat(self) -> str: ...

    @property
    def lora_dropout(self) -> float: ...

    @property
    def data_shards(self) -> int: ...

    @property
    def batch_sharding(self) -> NamedSharding | None: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`flax.linen.Module.apply`: calls the module, or with `method` its `unembed` or `logits`."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...

    def clone(self, **updates: Any) -> Any:
        """The same module with other fields."""
        ...

    def prefill(
        self,
        params: ParamTree,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        adaptation: Adaptation,
        **extra_inputs: Any,
    ) -> PrefillOutput:
        """Processes packed rows without a cache and returns what one needs.

        Args:
          params: parameters of the model.
          tokens, positions, segments, adaptation: as in `Decoder.__call__`.
          extra_inputs: what `extra_model_inputs` returns.
        """
        ...

    def with_max_decoder_tokens(self, count: int) -> StudentModel:
        """The model for rows in which at most `count` tokens predict a next one.

        An encoder–decoder then computes its decoder for so many slots of a row only; see `T5.max_decoder_tokens`.
        """
        ...


def model_class(config: StudentConfig) -> Any:
    """The class of `StudentModel` that computes this configuration: called with it, or `for_mesh`."""
    return T5 if config.is_encoder_decoder else Decoder


def make_model(config: StudentConfig, attention: str, mesh: Mesh, **fields: Any) -> StudentModel:
    """The model for a mesh.

    Args:
      attention: `config.student.attention`.
      fields: of the module.

    Raises:
      UserError: the model or the mesh's platform does not support this attention.
    """
    return model_class(config).for_mesh(config, attention, mesh, **fields)


def extra_model_inputs(
    model: StudentModel,
    params: ParamTree,
    adaptation: Adaptation,
    branches: Int[Array, "B T"] | None = None,
    images: ImageInputs | None = None,
    dropout: jax.Array | None = None,
) -> dict[str, Any]:
    """A model's inputs from a batch's rows besides tokens, as arguments of the module and of `prefill`.

    Args:
      branches: where the rows fork or their prompts are attended to bidirectionally (prefix LM).
      images: of the rows, where they may hold images; the vision encoder runs where they are not features already.
      dropout: an RNG key, or None for no dropout.
    """
    inputs: dict[str, Any] = {} if branches is None else {"branches": branches}
    if images is None:
        return inputs
    if (features := images.features) is not None:
        if adaptation.vision is not None:
            raise ValueError("these are features of the vision encoder without the adapter, which changes it")
    else:
        compute = ComputeConfig(model.dtype, model.remat, model.lora_dropout, model.batch_sharding)
        adapter = adaptation.vision or NO_VISION_ADAPTER
        assert model.config.vision is not None and images.encoder is not None
        features = encode_images(model.config.vision, params["vision"], images.encoder, compute, adapter, dropout)
    return {**inputs, "image_features": ImageFeatures(features, images.mrope_offsets)}
