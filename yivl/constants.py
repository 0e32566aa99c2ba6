"""Constants of the released models, each with its source."""

from typing import Final

IMAGE_TOKEN_INDEX: Final = -200
"""Id of an image slot in ``input_ids``; never an index into the vocabulary.
Source: 01-ai/Yi, VL/llava/model/constants.py."""

IGNORE_INDEX: Final = -100
"""Label of a position where no loss is computed, the default of PyTorch's ``cross_entropy``.
Source: 01-ai/Yi, VL/llava/model/constants.py."""

DEFAULT_IMAGE_TOKEN: Final = "<image_placeholder>"
"""Text of an image slot in a prompt. Source: 01-ai/Yi, VL/llava/model/constants.py."""

LLAVA_IMAGE_TOKEN: Final = "<image>"
"""Text of an image slot in the data of LLaVA, LLaMA-Factory and InternVL, and in prompts of transformers' LLaVA.
Source: haotian-liu/LLaVA, llava/constants.py; hiyouga/LLaMA-Factory, src/llamafactory/extras/constants.py;
OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py."""

IMG_START: Final = "<img>"
IMG_END: Final = "</img>"
IMG_CONTEXT: Final = "<IMG_CONTEXT>"
"""Control tokens before and after an image, and of an image token between them.
Source: OpenGVLab/InternVL, internvl_chat/internvl/train/constants.py."""

INTERNVL_TOKENS: Final = (
    *(IMG_START, IMG_END, IMG_CONTEXT),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""Tokens that InternVL adds to the vocabulary of a language model, in this order. Source: as above."""

STOP_STRING: Final = "###"
"""Starts every turn, so it also ends an answer; one token in the released vocabulary (id 8308).
Source: 01-ai/Yi, VL/llava/conversation.py."""

HUMAN: Final = "Human"
"""Role name of the user. Source: 01-ai/Yi, VL/llava/conversation.py."""

ASSISTANT: Final = "Assistant"
"""Role name of the model. Source: 01-ai/Yi, VL/llava/conversation.py."""

SYSTEM_PROMPT: Final = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
"""System message of all training conversations. Source: 01-ai/Yi, VL/llava/conversation.py."""
