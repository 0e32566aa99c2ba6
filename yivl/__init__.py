"""Yi-VL: a bilingual vision-language model. Start with ``yivl.generation.Chat``."""

__version__ = "0.1.0"
