"""Where a text encoder comes from: a folder, or a name with the revision found at start."""

from __future__ import annotations

import os

from fsr_vllm.compat.types import HfConfig


def split_revision(encoder: str) -> tuple[str, str | None]:
    """(folder or name, revision) of a text encoder in the settings; a folder has no revision."""
    if os.path.isdir(encoder):
        return encoder, None
    name, at, revision = encoder.rpartition("@")
    return (name, revision) if at else (encoder, None)


def read_config(encoder: str) -> HfConfig:
    """The encoder's CLIPConfig; transformers' errors, or ValueError for a folder's revision."""
    from transformers import CLIPConfig

    name, revision = split_revision(encoder)
    if revision is not None and os.path.isdir(name):
        raise ValueError(f"{name} is a folder, which has no revision {revision}")
    return CLIPConfig.from_pretrained(name, revision=revision)


def resolved(encoder: str) -> str:
    """NAME@COMMIT of a named encoder, so that every worker loads the same; a folder as it is."""
    from transformers.utils import cached_file, extract_commit_hash

    name, revision = split_revision(encoder)
    if os.path.isdir(name):
        return encoder
    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    return f"{name}@{commit}" if commit else encoder
