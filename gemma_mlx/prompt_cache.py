"""What is kept of a conversation between its turns, so that a next prompt is read from where it departs."""

from __future__ import annotations


class PromptCache:
    """One conversation's keys and values, reused where the next prompt begins as the last one did."""
