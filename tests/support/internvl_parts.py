"""The golden model of InternVL-Chat as the parts that training starts from."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from support.golden_internvl import CHECKPOINT

NUM_IMAGE_TOKENS = 9


class Parts(NamedTuple):
    """A Llama folder, an InternViT folder, and the file of a projector."""

    language_model: Path
    vit: Path
    projector: Path

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that name them."""
        flags = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter")
        return dict(zip(flags, self, strict=True))


def write_parts(folder: Path, *, image_tokens: bool = False) -> Parts:
    """Write the parts; the vocabulary of the language model ends before the image tokens unless ``image_tokens``."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    weights = {key: value for path in CHECKPOINT.glob("*.safetensors") for key, value in load_file(path).items()}

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    parts = Parts(folder / "llm", folder / "vit", folder / "mlp.pth")
    decoder, fields = part("language_model."), config["llm_config"]
    if not image_tokens:
        fields["vocab_size"] -= NUM_IMAGE_TOKENS
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            decoder[key] = decoder[key][:-NUM_IMAGE_TOKENS].clone()
    _write_model(parts.language_model, fields, decoder)
    _write_model(parts.vit, config["vision_config"], part("vision_model."))
    shutil.copy(CHECKPOINT / "preprocessor_config.json", parts.vit)
    torch.save(part("mlp1."), parts.projector)
    for path in CHECKPOINT.glob("*token*"):
        shutil.copy(path, parts.language_model)
    if not image_tokens:
        _remove_image_tokens(parts.language_model, fields["vocab_size"])
    return parts


def _write_model(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _remove_image_tokens(folder: Path, vocab_size: int) -> None:
    (folder / "added_tokens.json").unlink()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((folder / name).read_text())
        fields.pop("additional_special_tokens")
        if known := fields.get("added_tokens_decoder"):
            fields["added_tokens_decoder"] = {key: known[key] for key in known if int(key) < vocab_size}
        (folder / name).write_text(json.dumps(fields))
