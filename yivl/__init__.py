"""Yi-VL and InternVL-Chat-V1-2, bilingual (English, Chinese) vision-language models. Start with ``Chat``.

Importing ``yivl`` imports no PyTorch: public names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yivl.checkpoint.loading import load_model
    from yivl.inference.chat import Chat
    from yivl.model.configuration import YiVLConfig
    from yivl.model.modeling import YiVLForCausalLM

__version__ = "0.1.0"
__all__ = ["Chat", "YiVLConfig", "YiVLForCausalLM", "__version__", "load_model"]

_MODULES = {
    "Chat": "yivl.inference.chat",
    "YiVLConfig": "yivl.model.configuration",
    "YiVLForCausalLM": "yivl.model.modeling",
    "load_model": "yivl.checkpoint.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'yivl' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
