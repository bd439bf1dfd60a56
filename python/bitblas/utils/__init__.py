"""Helpers that other projects import."""

from .target_detector import auto_detect_nvidia_target, get_all_nvidia_targets

__all__ = ["auto_detect_nvidia_target", "get_all_nvidia_targets"]
