"""Parts of the GPU report about inference in bfloat16 with random weights of the 6B shape, created on the device.

python scripts/gpu_report_inference.py --part bf16 --device cuda
"""

import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gpu_report_parts import Figures, Part, require_packages, run_part

from yivl import command_line

PHOTO = Path(__file__).resolve().parents[1] / "tests/golden/images/photo_rgb.jpg"


@dataclass(frozen=True)
class Setting:
    """What is measured: the 6B shape, or *tiny* in the rehearsal."""

    device: str
    shape: str
    new_tokens: int
    repeats: int
    rows: tuple[int, ...]
    """Requests that are decoded together."""
    rate_size: int | None
    """Side of the matrices whose product is timed; ``None``: that of ``machine_rates``."""

    @classmethod
    def of(cls, figures: Figures) -> "Setting":
        """Return the setting of a part."""
        if figures.rehearsal:
            return cls(figures.device, "tiny", 8, 1, (1, 2), 1024)
        return cls(figures.device, "6b", 128, 5, (1, 8, 32), None)

    @cached_property
    def rates(self) -> tuple[float, float]:
        """Bandwidth in bytes/s and matrix products in FLOP/s, in bfloat16."""
        import torch
        from benchmark_inference import machine_rates

        return machine_rates(torch.bfloat16, self.device, self.repeats, self.rate_size)

    def random_model(self) -> Any:
        """Return the random model of the shape in bfloat16."""
        from random_models import random_model

        return random_model(self.shape, "bfloat16", self.device)


@cache
def open_photo() -> Any:
    """Return the image of all questions, decoded."""
    from PIL import Image

    return Image.open(PHOTO).convert("RGB")


def answer_figures(loaded: Any, setting: Setting) -> dict[str, Any]:
    """Return first token and decoding of one request with their bounds, and the peak of memory."""
    from benchmark_inference import compare_with_bounds, measure_answer, peak_bytes

    answer = measure_answer(loaded, open_photo(), setting.repeats, setting.new_tokens)
    peak = peak_bytes(setting.device)  # before the rates, which take memory of their own
    found: dict[str, Any] = compare_with_bounds(loaded.model, answer, *setting.rates)
    return found | {"prompt_tokens": answer["prompt_tokens"], "peak_bytes": peak}


def batch_figures(loaded: Any, setting: Setting, rows: int) -> dict[str, float]:
    """Return tokens per second of requests that are decoded together, each with its own prompt, and the bound."""
    from benchmark_inference import QUESTIONS, decoded_bytes, peak_bytes

    from yivl.inference.chat import Chat
    from yivl.inference.engine import Engine

    chat, engine = Chat(loaded, reuse_cache=False), Engine(loaded)
    image = chat.encode(open_photo())
    states = [chat.begin(QUESTIONS[0], image, temperature=0, max_new_tokens=setting.new_tokens) for _ in range(rows)]
    for state in states:
        engine.add(state)
    engine.step()  # the first step of a batch builds what the next ones reuse
    start, steps = time.perf_counter(), 0
    while len(engine):
        engine.step()
        steps += 1
    seconds = (time.perf_counter() - start) / steps
    peak = peak_bytes(setting.device)
    prompt_tokens = len(states[0].keys)
    one, none = (decoded_bytes(loaded.model, length) for length in (prompt_tokens, 0))
    bound = (none + rows * (one - none)) / setting.rates[0]
    return {
        "tokens_per_s": rows / seconds,
        "seconds_per_step": seconds,
        "times_the_bound": seconds / bound,
        "peak_bytes": peak,
    }


def bf16(figures: Figures) -> None:
    """Measure the model as it is loaded by default, then transformers' LLaVA with the same weights."""
    from benchmark_inference import measure_chat

    setting = Setting.of(figures)
    loaded = setting.random_model()
    figures.add("answer", lambda: answer_figures(loaded, setting))
    figures.add("transformers", lambda: compare_with_transformers(loaded, setting, figures.values["answer"]))
    figures.add("chat", lambda: measure_chat(loaded, open_photo(), setting.repeats))
    for rows in setting.rows[1:]:
        figures.add(f"batch_of_{rows}", lambda rows=rows: batch_figures(loaded, setting, rows))
    figures.add("flash_attention_2", lambda: flash_figures(loaded, setting))


def flash_figures(loaded: Any, setting: Setting) -> dict[str, Any]:
    """Return the figures of an answer with FlashAttention-2."""
    require_packages("flash_attn")
    loaded.model.set_attn_implementation("flash_attention_2")
    return answer_figures(loaded, setting)


def compare_with_transformers(loaded: Any, setting: Setting, ours: dict[str, Any]) -> dict[str, float]:
    """Return the times of transformers' own LLaVA with the same weights, and how much longer it takes."""
    import statistics

    from benchmark_inference import peak_bytes, question_ids
    from peer_workers import answer_by_transformers

    def pixels() -> Any:
        return loaded.image_processor([open_photo()])

    model, num_patches = transformers_llava(loaded), loaded.model.config.num_patches
    ids = question_ids(loaded.tokenizer, loaded.model.config.prompt_template)
    answer = answer_by_transformers(model, pixels, ids, num_patches, setting.new_tokens)
    times = [answer() for _ in range(setting.repeats + 1)][1:]
    first = statistics.median(time["encode_s"] + time["prefill_s"] for time in times)
    rate = statistics.median(time["tokens_per_s"] for time in times)
    found = {"first_token_seconds": first, "tokens_per_s": rate, "peak_bytes": peak_bytes(setting.device)}
    if "error" not in ours:
        found["first_token_over_ours"] = first / ours["first_token"]["seconds"]
        found["our_tokens_per_s_over_it"] = ours["decode"]["tokens_per_s"] / rate
    return found


def transformers_llava(loaded: Any) -> Any:
    """Return transformers' LLaVA that shares the weights of a model; its projector and ViT are ours.

    That is the model of the ``-hf`` format, without a copy of the weights and without a file.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from yivl.checkpoint.hf_format import STRATEGIES
    from yivl.export.llava import text_config, vision_config

    ours, config = loaded.model, loaded.model.config
    llava_config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_config(config)),
        text_config=LlamaConfig(**text_config(config)),
        image_token_index=config.vocab_size - 1,  # no prompt has the last one
        vision_feature_layer=config.mm_vision_select_layer,
        vision_feature_select_strategy=STRATEGIES[config.mm_vision_select_feature],
        dtype=ours.dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config).eval()
    names = model.model.language_model.state_dict().keys()
    weights = {name: value for name, value in ours.model.state_dict().items() if name in names}
    model.model.language_model.load_state_dict(weights, assign=True)
    model.model.language_model.rotary_emb = ours.model.rotary_emb  # its buffers are in no state dict
    model.model.vision_tower = ours.get_vision_tower().vit
    model.model.multi_modal_projector = ours.model.mm_projector
    model.lm_head = ours.lm_head
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    return model


def compiled(figures: Figures) -> None:
    """Measure decoding with ``--compile``, alone and in a batch; a rehearsal leaves out the work of the compiler.

    ``cuda_graphs`` is whether a figure was measured with CUDA graphs; why it was not is in the log.
    """
    import torch
    from benchmark_inference import synchronize

    from yivl.inference.compilation import compile_decoding

    setting = Setting.of(figures)
    with torch._dynamo.config.patch(disable=figures.rehearsal):
        loaded = setting.random_model()
        synchronize(setting.device)
        start = time.perf_counter()
        loaded = compile_decoding(loaded)
        figures.values["compilation_seconds"] = time.perf_counter() - start
        figures.values |= graph_figures(loaded)
        figures.show()
        figures.add("answer", lambda: answer_figures(loaded, setting) | graph_figures(loaded))
        for rows in setting.rows[1:]:
            figures.add(
                f"batch_of_{rows}", lambda rows=rows: batch_figures(loaded, setting, rows) | graph_figures(loaded)
            )


def graph_figures(loaded: Any) -> dict[str, bool]:
    """Return whether all decoding steps so far were CUDA graphs: none was refused, and memory sufficed."""
    graphs = loaded.decoding_graphs
    return {"cuda_graphs": graphs is not None and not graphs.num_left}


PARTS = (
    Part("bf16", 100, "inference in bfloat16, SDPA", bf16),
    Part("compiled", 150, "inference in bfloat16 with --compile", compiled),
)

if __name__ == "__main__":
    command_line.run(lambda: run_part(PARTS, __doc__))
