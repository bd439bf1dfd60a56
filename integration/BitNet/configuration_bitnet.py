"""What a BitNet-b1.58 model is: transformers' own config, and what 1bitLLM's and our packed folders say beside it."""

from __future__ import annotations

from typing import Any

from transformers import BitNetConfig

from bitblas.errors import ConfigError

#: What a config.json of 1bitLLM's, whose model_type is "llama", means where it says nothing.
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}


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
        """Read a config.json, one of 1bitLLM's included."""
        fields, rest = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == "llama":
            fields = {**_LLAMA, **fields, "model_type": cls.model_type}
        return fields, rest
