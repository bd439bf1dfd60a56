"""What config.json says of a quantized model, and what is asked for when one is quantized while it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitblas.checkpoints.spec import FORMAT_VERSION, QUANT_METHOD, LayerSpec, make_config, parse_config
from bitblas.errors import ConfigError


@register_quantization_config(QUANT_METHOD)
class BitBLASConfig(QuantizationConfigMixin):
    """How a model is quantized.

    Parameters
    ----------
    W_dtype : str
        The format to which the weights of a dense folder are rounded while it is loaded.
    group_size : int
        How many consecutive inputs share a scale: a divisor of every layer's inputs; -1: all.
    symmetric : bool, optional
        False: with zero points; True: without. None: with them where the format is a ``uint``.
    modules_to_not_convert : sequence of str, optional
        Layers that stay dense, as transformers understands it: a name, the end of one, or a regular expression for its
        beginning. None: the output embeddings, and what is tied to another weight.
    layers : mapping, optional
        Of a folder that is quantized already, as its config.json has them. The first three parameters are of no account then.
    format_version : int
        Of such a folder.
    quant_method : str
        ``"bitblas"``.

    Attributes
    ----------
    layers : dict of str to LayerSpec, or None
        The quantized layers by name; None before there are any.

    Raises
    ------
    CheckpointError
        `layers` are malformed, or of a newer version.
    ConfigError
        `group_size` is neither -1 nor a positive integer.
    """

    quant_method: str  # type: ignore[assignment]  # no member of their enum

    def __init__(
        self,
        W_dtype: str = "uint4",
        group_size: int = 128,
        symmetric: bool | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        *,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise ConfigError(f"group_size is {group_size!r}; it must be -1 or a positive integer")
        self.quant_method = quant_method
        self.W_dtype, self.group_size, self.symmetric = W_dtype, group_size, symmetric
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.layers: dict[str, LayerSpec] | None = None
        if layers is not None:
            self.layers = parse_config(
                {"quant_method": quant_method, "format_version": format_version, "layers": layers}
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; of a model that is still dense, what was asked for."""
        if self.layers is not None:
            return make_config(self.layers, self.modules_to_not_convert or ())
        names = ("quant_method", "W_dtype", "group_size", "symmetric", "modules_to_not_convert")
        return {name: getattr(self, name) for name in names}
