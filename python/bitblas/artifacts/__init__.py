"""Compiled operators on disk: what identifies one, how it is verified, and the store that many processes share."""

from .record import Artifact, artifact_key
from .store import ArtifactStore, Build

__all__ = ["Artifact", "ArtifactStore", "Build", "artifact_key"]
