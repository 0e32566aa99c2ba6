"""Yi-VL: a bilingual vision-language model. Start with ``yivl.inference.chat.Chat``."""

__version__ = "0.1.0"
