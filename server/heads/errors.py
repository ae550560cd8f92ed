"""Errors of output heads."""

from __future__ import annotations


class HeadError(Exception):
    """What a head was given, or what it computes, is no distribution over its labels."""
