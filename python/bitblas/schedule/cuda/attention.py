"""Rules for attention on cards."""

from __future__ import annotations

from typing import Any

from ..rule import AttentionRule, AttentionTiling

CUDA_ATTENTION_RULES: tuple[AttentionRule[Any], ...] = ()
CUDA_ATTENTION_TILINGS: tuple[type[AttentionTiling], ...] = ()
