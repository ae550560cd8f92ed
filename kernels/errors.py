"""Errors of the kernels."""

from __future__ import annotations


class KernelError(Exception):
    """Base of every error raised by motet.kernels."""


class BackendUnavailableError(KernelError):
    """The backend that was asked for cannot run here."""
