"""BitNet-b1.58 on transformers' own model: ternary layers to train with, and packed ones to run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import BitNetForCausalLM, Cache, GenerationConfig, initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bitnet.modeling_bitnet import (
    BitNetAttention,
    BitNetMLP,
    BitNetModel,
    BitNetPreTrainedModel,
    BitNetRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from bitblas.checkpoints.bitnet import LATENT_NORMS
from bitblas.checkpoints.shards import open_shards, read_json
from bitblas.errors import ArgumentError, CheckpointError
from bitblas.nn.operators import build_operators
from configuration_bitnet import BitnetConfig
from utils_quant import BitLinear, BitLinearBitBLAS

L = TypeVar("L", bound=torch.nn.Module)
M = TypeVar("M", bound=torch.nn.Module)

_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: How many tensors a message names.
_MOST = 8
#: Names of 1bitLLM's checkpoints, as patterns, and ours, which are transformers'.
KEY_MAPPING = {re.escape(theirs): ours for theirs, ours in LATENT_NORMS.items()}


class BitnetAttentionQKVFused(BitNetAttention):
    """transformers' attention, in which q, k and v are one packed layer, `qkv_proj`; for inference."""

    qkv_proj: BitLinearBitBLAS

    @classmethod
    def from_bit_attention(cls, attention: BitNetAttention) -> BitnetAttentionQKVFused:
        """Of an attention with `BitLinear` layers, whose other parts are taken over."""
        with torch.device("meta"):
            made = cls(attention.config, attention.layer_idx)
        made.qkv_proj = _packed([getattr(attention, name) for name in _QKV])
        _take_over(made, attention, _QKV)
        return made

    @property
    def rows(self) -> tuple[int, int, int]:
        """Outputs of `qkv_proj` that are q, k and v."""
        config: Any = self.config
        keys = config.num_key_value_heads * self.head_dim
        return config.num_attention_heads * self.head_dim, keys, keys

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) to the same, and the attention weights where the implementation gives them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = self.qkv_proj(hidden_states).split(self.rows, dim=-1)
        query, key, value = (part.reshape(heads).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(self.attn_sub_norm(mixed.flatten(-2))), weights


class BitnetMLPFuseGateUp(BitNetMLP):
    """transformers' MLP, in which gate and up are one packed layer, `gate_up_proj`; for inference."""

    gate_up_proj: BitLinearBitBLAS

    @classmethod
    def from_bit_mlp(cls, mlp: BitNetMLP) -> BitnetMLPFuseGateUp:
        """Of an MLP with `BitLinear` layers, whose other parts are taken over."""
        with torch.device("meta"):
            made = cls(mlp.config)
        made.gate_up_proj = _packed([getattr(mlp, name) for name in _GATE_UP])
        _take_over(made, mlp, _GATE_UP)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.ffn_sub_norm(self.act_fn(gate) * up))


class BitnetModel(BitNetModel):
    """transformers' `BitNetModel`, whose projections are `BitLinear` layers."""

    def __init__(self, config: BitnetConfig) -> None:
        super().__init__(config)
        for parent, name, linear in _layers(self.layers, torch.nn.Linear):
            made = BitLinear.from_linear(linear)
            if getattr(linear, "_is_hf_initialized", False):  # transformers' mark: its numbers have been drawn
                made._is_hf_initialized = True  # type: ignore[assignment]  # no tensor
            setattr(parent, name, made)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Draw numbers for what no file has; it is the innermost model around a layer that transformers asks."""
        super()._init_weights(module)
        if isinstance(module, BitLinear) and not module.deployed:
            initialization.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                initialization.zeros_(module.bias)


class BitnetForCausalLM(BitNetForCausalLM):
    """transformers' `BitNetForCausalLM` whose projections are ternary; embeddings, norms and `lm_head` are dense.

    A new model, and one that `from_pretrained` read from float weights, has `BitLinear` layers, which quantize at each call
    and can be trained. `quantize` packs them, in place; `save_quantized` and `from_quantized` keep the packed model.

    Parameters
    ----------
    config : BitnetConfig or transformers.BitNetConfig
        With `packed` the layers have room for packed weights, and hold none.
    """

    config_class = BitnetConfig

    def __init__(self, config: BitnetConfig) -> None:
        if not isinstance(config, BitnetConfig):
            config = BitnetConfig.from_dict(config.to_dict())
        BitNetPreTrainedModel.__init__(self, config)  # that of transformers' class makes a model of its own
        self.model = BitnetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.packed:
            self._pack(config.fuse_qkv, config.fuse_gateup)

    # -- packing ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(self, fuse_qkv: bool = True, fuse_gateup: bool = True, build: bool = True) -> BitnetForCausalLM:
        """Pack every ternary layer to 2 bits, in place, and free the float weights.

        Parameters
        ----------
        fuse_qkv, fuse_gateup : bool
            Join q, k and v, and gate and up, into one layer each. Each part keeps a scale of its own, which is rounded to the
            model's dtype; the scale of a layer that is not joined is float32.
        build : bool
            Load or build the kernels now, instead of by the first call.

        Returns
        -------
        BitnetForCausalLM
            `self`.

        Raises
        ------
        ArgumentError
            The model, or a layer, is packed already, its dtype is none of float32, float16 and bfloat16, or a weight holds a
            NaN or an infinity. Then nothing has been packed.
        """
        if self.config.packed:
            raise ArgumentError("the model is packed already")
        self._check_unpacked()
        dtypes = {layer.weight.dtype for layer in self.ternary_layers().values()}
        if not dtypes <= set(_FLOATS):
            raise ArgumentError(f"weights are {', '.join(map(str, dtypes))}; allowed: {', '.join(map(str, _FLOATS))}")
        for name, layer in self.ternary_layers().items():
            if not bool(layer.weight.isfinite().all()):
                raise ArgumentError(f"{name}: the weight holds a NaN or an infinity")
        self._pack(fuse_qkv, fuse_gateup)
        self.config.packed, self.config.fuse_qkv, self.config.fuse_gateup = True, fuse_qkv, fuse_gateup
        if build:
            self.build()
        return self.eval()

    def _post_process_weights(self) -> BitnetForCausalLM:
        """Pack every layer by itself: `quantize` without joining any."""
        return self.quantize(fuse_qkv=False, fuse_gateup=False)

    def _pack(self, fuse_qkv: bool, fuse_gateup: bool) -> None:
        for block in self.model.layers:
            if fuse_qkv:
                block.self_attn = BitnetAttentionQKVFused.from_bit_attention(block.self_attn)
            if fuse_gateup:
                block.mlp = BitnetMLPFuseGateUp.from_bit_mlp(block.mlp)
        for parent, name, layer in _layers(self, BitLinear):
            setattr(parent, name, _packed([layer]))

    def _check_unpacked(self) -> None:
        """Raise ArgumentError where a layer of a model with float weights is packed, as `bitblas.deploy` does it."""
        packed = [name for name, layer in self.ternary_layers().items() if layer.deployed]
        if packed and not self.config.packed:
            raise ArgumentError(
                f"{packed[0]} has been packed by itself ({len(packed)} layers have): call quantize() on the float model "
                "instead, and then save_quantized()"
            )

    def build(self) -> None:
        """Load or build the kernels of a packed model; once for each shape."""
        build_operators(layer.bitblas_matmul for _, _, layer in _layers(self, BitLinearBitBLAS))

    def ternary_layers(self) -> dict[str, BitLinear | BitLinearBitBLAS]:
        """The ternary layers by name, packed or not."""
        return {
            name: module for name, module in self.named_modules() if isinstance(module, (BitLinear, BitLinearBitBLAS))
        }

    # -- folders ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]  # as it is called
        """Load float weights, in transformers' layout or in 1bitLLM's; options are those of transformers.

        Raises
        ------
        CheckpointError
            The folder holds packed weights, is quantized otherwise, or is that of another model; or it lacks a tensor, has one
            more, or one of another shape, and neither `output_loading_info` nor `ignore_mismatched_sizes` allows it.
        """
        config = options.get("config") or BitnetConfig.from_pretrained(folder)
        if getattr(config, "packed", False):
            raise CheckpointError(f"{folder} holds packed weights: load it with {cls.__name__}.from_quantized")
        quantization = getattr(config, "quantization_config", None) or {}
        if quantization.get("quantization_mode") == "online" and not quantization.get("use_rms_norm"):
            del config.quantization_config  # of transformers' own layers, which round float weights as ours do
        elif quantization:
            raise CheckpointError(f"{folder} is quantized: convert it with `bitblas repack {folder} DESTINATION`")
        mapping = {**KEY_MAPPING, **(options.pop("key_mapping", None) or {})}
        wants_report, may_differ = (
            options.pop(name, False) for name in ("output_loading_info", "ignore_mismatched_sizes")
        )
        options |= {
            "config": config,
            "key_mapping": mapping,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        loaded: Any = super().from_pretrained(folder, *args, **options)
        model, report = loaded
        if wants_report:
            return loaded
        _check_report(folder, report, may_differ)
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers', with its names for the tensors also where they were read under 1bitLLM's.

        Raises
        ------
        ArgumentError
            Layers have been packed, and not by `quantize`: no folder of float weights, and none of packed ones.
        """
        self._check_unpacked()
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **options})

    def save_quantized(self, folder: str | Path, **options: Any) -> None:
        """Write a packed model: config.json and safetensors with `qweight` and `sw` of each ternary layer.

        Parameters
        ----------
        folder : str or Path
            Is made where it is not there.
        **options
            As of `save_pretrained`.

        Raises
        ------
        ArgumentError
            The model is not packed.
        """
        if not self.config.packed:
            raise ArgumentError("the model is not packed: call quantize() first")
        self.save_pretrained(folder, **options)

    @classmethod
    def from_quantized(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> BitnetForCausalLM:
        """Load what `save_quantized` wrote, with its kernels built and in evaluation mode.

        Parameters
        ----------
        folder : str or Path
            On this machine.
        dtype : torch.dtype, optional
            float32, float16 or bfloat16, of activations and of all that is not packed. None: what config.json says.
        device : torch.device or str
            Where to load it.

        Raises
        ------
        CheckpointError
            The folder is none of `save_quantized`, or lacks a tensor, or has one of another shape.
        """
        folder = Path(folder)
        config = _read_config(folder)
        config.dtype = wanted = dtype or config.dtype or torch.float32
        if not isinstance(wanted, torch.dtype) or wanted not in _FLOATS:
            raise ArgumentError(f"dtype is {wanted}; allowed: {', '.join(map(str, _FLOATS))}")
        with torch.device("meta"):
            model: Any = cls(config)
        model.to(wanted)
        model.model.rotary_emb = BitNetRotaryEmbedding(config)  # what it computes is in no file
        model._load_packed(folder, torch.device(device), wanted)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.build()
        return model.to(device).eval()

    def _load_packed(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Fill a model without data with the tensors of a folder."""
        shards, state = open_shards(folder), {}
        for name in shards.infos:
            tensor = shards.get(name)
            is_cast = tensor.is_floating_point() and not name.endswith(".sw")
            state[name] = tensor.to(device, dtype if is_cast else tensor.dtype, copy=True)
        shards.close()
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        try:
            self.load_state_dict(state, assign=True)
        except RuntimeError as error:  # names the tensors
            raise CheckpointError(f"{folder}: {error}") from error
        self.tie_weights()


# -- layers of a model -----------------------------------------------------------------------------------------------------


def _layers(model: torch.nn.Module, kind: type[L]) -> list[tuple[torch.nn.Module, str, L]]:
    """The layers of a class in a model: the module that has each, and the name that it has there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


def _take_over(made: torch.nn.Module, old: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Give a module the parts of another, and leave out those that have been joined."""
    for name, child in old.named_children():
        if name in names:
            delattr(made, name)
        else:
            setattr(made, name, child)
    made.train(old.training)


def _packed(layers: list[BitLinear]) -> BitLinearBitBLAS:
    """One packed layer in the place of float ones: with their weights, or with room for them where these have no data."""
    rows, first = [layer.out_features for layer in layers], layers[0]
    options: Any = {"device": "meta", "dtype": first.weight.dtype}
    if first.weight.is_meta:
        kind = "ai8pc_wpt" if len(rows) == 1 else "ai8pc_wpc"
        made = BitLinearBitBLAS(first.in_features, sum(rows), first.bias is not None, quant_type=kind, **options)
        made.replace_weight_param_with_qweight()
        return made
    if len(rows) > 1:
        joined = BitLinear(first.in_features, sum(rows), first.bias is not None, **options)
        for name in ("weight", "bias")[: 1 + (first.bias is not None)]:
            tensors = [getattr(layer, name).detach() for layer in layers]
            joined.register_parameter(name, torch.nn.Parameter(torch.cat(tensors)))
        first = joined
    return BitLinearBitBLAS.from_bit_linear(first, rows)


def _read_config(folder: Path) -> BitnetConfig:
    """The config of a packed folder."""
    fields = read_json(folder / "config.json")
    if not fields.get("packed"):
        raise CheckpointError(
            f"{folder / 'config.json'} does not say that weights are packed: no folder of save_quantized"
        )
    return BitnetConfig.from_dict(fields)


def _check_report(folder: Any, report: Mapping[str, Any], may_differ: bool) -> None:
    """Refuse what transformers' report says of tensors; it fills those with random numbers that are missing."""
    differ = [
        f"{name} has shape {tuple(found)} instead of {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    wrong = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is not known" for name in sorted(report["unexpected_keys"])),
        *([] if may_differ else differ),
    ]
    if wrong:
        more = f", and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        raise CheckpointError(f"{folder}: {', '.join(wrong[:_MOST])}{more}")
