"""Ask an -hf folder with transformers alone, 4.57 or 5: python ask_transformers.py MODEL CASES RESULT."""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava import modeling_llava


class YiVLProjector(nn.Module):
    """The projector of Yi-VL, for the place of transformers' own, which has two layers."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(vision, text), nn.LayerNorm(text)
        self.linear_3, self.linear_4 = nn.Linear(text, text), nn.LayerNorm(text)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden = self.linear_2(self.linear_1(image_features))
        return self.linear_4(self.linear_3(nn.functional.gelu(hidden)))


def main(folder: str, cases: Path, result: Path) -> None:
    """Write the greedy answers."""
    modeling_llava.LlavaMultiModalProjector = YiVLProjector
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    # The Pillow processor: that of torchvision resizes a little differently.
    pillow = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    processor = AutoProcessor.from_pretrained(folder, **pillow)
    answers = []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        content = [{"type": "image"}, {"type": "text", "text": case["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(images=Image.open(case["image"]), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**batch, do_sample=False, max_new_tokens=64)[0, batch["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        answers.append(text.strip().removesuffix("###").strip())
    result.write_text(json.dumps({"version": transformers.__version__, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
