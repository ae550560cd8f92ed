"""Errors of loading and running the base model."""

from __future__ import annotations


class ModelError(Exception):
    """Base of every error raised by motet.server.model."""


class ModelNotFoundError(ModelError):
    """There is no model at the given place, or it cannot be obtained."""


class UnsupportedModelError(ModelError):
    """The model, or the way it is asked to run, cannot be served exactly."""


class ChecksumError(ModelError):
    """Downloaded content is not what it should be."""
