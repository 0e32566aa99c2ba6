"""The text of model cards that depends on the architecture: tags, limitations, credits, citation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from yivl.model.configuration import YiVLConfig
from yivl.model.internvl_configuration import InternVLConfig


@dataclass(frozen=True)
class Family:
    """The models of an architecture."""

    model: str
    """One of them, with its article."""
    tags: tuple[str, ...] = ()
    """Of the hub."""
    limitation: str = ""
    """Of the released models."""
    credits: str = ""
    citation: str = ""
    """BibTeX."""


_YI_VL: Final = Family(
    "a Yi-VL model",
    ("yi-vl", "llava"),
    "The released Yi-VL models were trained with one image per conversation.",
    "Yi-VL is by [01.AI](https://github.com/01-ai/Yi), built on [LLaVA](https://github.com/haotian-liu/LLaVA) and "
    "initialized with the ViT of [OpenCLIP](https://github.com/mlfoundations/open_clip).",
    """@misc{ai2024yi,
  title         = {Yi: Open Foundation Models by 01.AI},
  author        = {{01.AI} and Alex Young and Bei Chen and others},
  year          = {2024},
  eprint        = {2403.04652},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL},
}""",
)
_INTERNVL: Final = Family(
    "a model of the architecture of InternVL-Chat-V1-2",
    ("internvl",),
    "InternVL-Chat-V1-2 was fine-tuned on conversations with at most one image.",
    "InternVL-Chat-V1-2 is by [OpenGVLab](https://github.com/OpenGVLab/InternVL); it connects InternViT-6B and "
    "[Nous-Hermes-2-Yi-34B](https://huggingface.co/NousResearch/Nous-Hermes-2-Yi-34B), which derives from "
    "[Yi-34B](https://github.com/01-ai/Yi) of 01.AI.",
    """@misc{chen2023internvl,
  title         = {InternVL: Scaling up Vision Foundation Models and Aligning for Generic Visual-Linguistic Tasks},
  author        = {Zhe Chen and Jiannan Wu and Wenhai Wang and others},
  year          = {2023},
  eprint        = {2312.14238},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV},
}""",
)

FAMILIES: Final[Mapping[str, Family]] = {YiVLConfig.model_type: _YI_VL, InternVLConfig.model_type: _INTERNVL}
"""By ``model_type`` of the configuration."""
ANY: Final = Family("a vision-language model")
"""Of an adapter that does not record its architecture."""
