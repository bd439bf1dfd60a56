"""What a BitNet-b1.58 model is: transformers' own config, and what 1bitLLM's and our packed folders say beside it."""

from __future__ import annotations

from typing import Any

from transformers import BitNetConfig

from bitblas.checkpoints.bitnet import LATENT_DEFAULTS, has_latent_weights
from bitblas.errors import CheckpointError, ConfigError

#: The model_type of a packed folder, which transformers does not know: its own class would take the weights for missing.
PACKED_TYPE = "bitnet_packed_by_bitblas"


class BitnetConfig(BitNetConfig):
    """The config of a `BitnetForCausalLM`: transformers' `BitNetConfig` with the fields of 1bitLLM's models.

    Parameters
    ----------
    weight_bits, input_bits : int
        1 and 8: ternary weights, int8 activations. There are no others.
    packed : bool
        Whether the folder holds packed weights, as `BitnetForCausalLM.save_quantized` writes them.
    fuse_qkv, fuse_gateup : bool
        Of a packed model: whether q, k and v, and gate and up, are one layer each.

    Raises
    ------
    ConfigError
        Other numbers of bits.
    """

    weight_bits: int = 1
    input_bits: int = 8
    packed: bool = False
    fuse_qkv: bool = False
    fuse_gateup: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if (self.weight_bits, self.input_bits) != (1, 8):
            raise ConfigError(
                f"weight_bits is {self.weight_bits} and input_bits {self.input_bits}; allowed: 1 (ternary) and 8"
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json, one of 1bitLLM's included.

        Raises
        ------
        CheckpointError
            It is that of another model.
        """
        fields, rest = super().get_config_dict(*args, **kwargs)
        kind = fields.get("model_type", cls.model_type)
        if kind == "llama" and has_latent_weights(fields):
            fields = {**LATENT_DEFAULTS, **fields}
        elif kind not in (cls.model_type, PACKED_TYPE):
            raise CheckpointError(f"the config is that of a model of type {kind!r}; BitNet-b1.58 models are 'bitnet'")
        return {**fields, "model_type": cls.model_type}, rest

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with a model_type of its own where weights are packed."""
        fields = super().to_dict()
        return {**fields, "model_type": PACKED_TYPE} if self.packed else fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; of a packed model, too."""
        return super().from_dict({name: value for name, value in config_dict.items() if name != "model_type"}, **kwargs)
