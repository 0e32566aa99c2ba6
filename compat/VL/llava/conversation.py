"""Prompts. Source: 01-ai/Yi, VL/llava/conversation.py."""

from enum import Enum, auto

from yivl.conversation import Conversation, conv_templates

__all__ = ["Conversation", "SeparatorStyle", "conv_templates", "default_conversation"]


class SeparatorStyle(Enum):
    """How turns are separated; the reference has one way."""

    SINGLE = auto()


default_conversation = conv_templates["mm_default"]
