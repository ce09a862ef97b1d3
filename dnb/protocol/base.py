"""Bases of all records: frozen, typed, and validated where they arrive."""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of plain facts."""


class Message(Record, frozen=True, tag=True):
    """Base of what is sent alone: its class name travels as the tag."""
