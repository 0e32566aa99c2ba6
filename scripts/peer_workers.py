"""Load one program of benchmark_peers.py and answer on request: the child processes of that script, not for users.

The first line of output describes the loaded program; every line of input runs one answer and prints its times, both
as JSON. llama.cpp may run in an interpreter that has only its bindings, so nothing else is imported at the top.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Program:
    """A program that has loaded its model."""

    run: Callable[[], dict[str, float]]
    """Answers once: ``encode_s``, ``prefill_s`` and ``tokens_per_s``."""
    bytes_before: int
    """Resident set after the imports, before the model was loaded."""
    facts: dict[str, Any]


def main() -> None:
    """Serve one program until the input ends."""
    load, job = PROGRAMS[sys.argv[1]], json.loads(sys.argv[2])
    with os.fdopen(os.dup(1), "w", buffering=1) as results:
        os.dup2(2, 1)  # libraries print to stdout
        program = load(job)
        program.run()  # warm up
        print(json.dumps(program.facts | {"resident_bytes": resident_bytes() - program.bytes_before}), file=results)
        for _ in sys.stdin:
            print(json.dumps(program.run()), file=results)


def resident_bytes() -> int:
    """Return the resident set of this process in bytes, mapped files included (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load_yivl(job: dict[str, Any]) -> Program:
    """Load this package: ``form`` of the job is a dtype of ``load_model``, ``8bit`` or ``4bit``, then ``+compile``."""
    import torch
    from PIL import Image

    from yivl.checkpoint.loading import load_model
    from yivl.inference.chat import Chat
    from yivl.inference.compilation import compile_decoding

    torch.set_num_threads(job["threads"])
    before, (form, _, is_compiled) = resident_bytes(), job["form"].partition("+")
    bits = {f"load_in_{form}": True} if form in ("4bit", "8bit") else {"dtype": form}
    loaded = load_model(job["checkpoint"], device=job["device"], **bits)
    if is_compiled:
        loaded = compile_decoding(loaded)
    chat = Chat(loaded, reuse_cache=False)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        image = chat.encode(Image.open(job["image"]))  # llama.cpp, too, decodes the file in every run
        encode = time.perf_counter() - start
        chat.reset()
        chat.ask(job["question"], image, temperature=0, max_new_tokens=job["new_tokens"])
        answer = chat.last_answer
        assert answer is not None
        assert answer.new_tokens == job["new_tokens"], "the answer ended early"
        computed = answer.prompt_tokens - answer.cached_tokens
        assert computed == job["prompt_tokens"], f"{computed} positions of the prompt were computed"
        return {
            "encode_s": encode,
            "prefill_s": answer.seconds_to_first_token,
            "tokens_per_s": answer.tokens_per_second,
        }

    return Program(run, before, {"dtype": str(loaded.model.dtype).removeprefix("torch.")})


def load_llava(job: dict[str, Any]) -> Program:
    """Load the LLaVA baseline of benchmark_inference.py."""
    import torch
    from benchmark_inference import LlavaBaseline
    from PIL import Image

    import yivl.checkpoint.loading  # noqa: F401 (its memory is not the model's)

    torch.set_num_threads(job["threads"])
    before = resident_bytes()
    baseline = LlavaBaseline(job["checkpoint"], job["device"], job["form"])

    def run() -> dict[str, float]:
        start = time.perf_counter()
        features = baseline.encode(Image.open(job["image"]))
        encoded = time.perf_counter()
        token, cache = baseline.prefill(features)
        first = time.perf_counter()
        baseline.decode(token, cache, job["new_tokens"] - 1)
        rate = (job["new_tokens"] - 1) / (time.perf_counter() - first)
        return {"encode_s": encoded - start, "prefill_s": first - encoded, "tokens_per_s": rate}

    return Program(run, before, {"dtype": job["form"]})


def load_transformers(job: dict[str, Any]) -> Program:
    """Load transformers' LLaVA on the ``-hf`` export.

    Its projector has no LayerNorms, so a part of it is randomly initialized, which does not change its cost.
    """
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(job["threads"])
    before = resident_bytes()
    model = LlavaForConditionalGeneration.from_pretrained(job["hf"], dtype=job["form"], ignore_mismatched_sizes=True)
    model = model.to(job["device"]).eval()
    processor = CLIPImageProcessor.from_pretrained(job["hf"])

    def pixels() -> Any:
        photo = Image.open(job["image"]).convert("RGB")
        return processor(photo, return_tensors="pt")["pixel_values"]

    num_patches = job["prompt_tokens"] - len(job["ids"]) + 1
    run = answer_by_transformers(model, pixels, job["ids"], num_patches, job["new_tokens"])
    return Program(run, before, {"dtype": job["form"]})


def load_internvl_of_transformers(job: dict[str, Any]) -> Program:
    """Load transformers' InternVL with the weights of an InternVL-Chat checkpoint.

    Its image tokens are in row-first order, those of InternVL-Chat-V1-2 transposed, which does not change its cost.
    """
    import torch
    from internvl_of_transformers import as_transformers
    from PIL import Image
    from transformers import CLIPImageProcessor

    from yivl.checkpoint.loading import load_model

    torch.set_num_threads(job["threads"])
    before = resident_bytes()
    model = as_transformers(load_model(job["checkpoint"], device=job["device"], dtype=job["form"]).model)
    processor = CLIPImageProcessor.from_pretrained(job["checkpoint"])
    side = processor.crop_size["height"]

    def pixels() -> Any:
        photo = Image.open(job["image"]).convert("RGB").resize((side, side))
        return processor(photo, return_tensors="pt")["pixel_values"]

    num_patches = job["prompt_tokens"] - len(job["ids"]) + 1
    run = answer_by_transformers(model, pixels, job["ids"], num_patches, job["new_tokens"])
    return Program(run, before, {"dtype": job["form"]})


def answer_by_transformers(
    model: Any, pixels: Callable[[], Any], ids: list[int], num_patches: int, new_tokens: int
) -> Callable[[], dict[str, float]]:
    """Return a function that answers once by ``generate`` of transformers, and returns its times.

    Args:
        model: ``LlavaForConditionalGeneration`` or ``InternVLForConditionalGeneration``.
        pixels: Returns the normalized image, ``(1, 3, image_size, image_size)``.
        ids: Of the prompt, negative at the image.
        num_patches: Of the image.
        new_tokens: Length of the answer.
    """
    import torch
    from transformers.generation import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Records when each token is chosen."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    image_id = model.config.image_token_id
    repeated = [[image_id] * num_patches if token < 0 else [token] for token in ids]
    prompt = torch.tensor([[token for tokens in repeated for token in tokens]], device=model.device)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        start = time.perf_counter()
        images = pixels().to(model.device, model.dtype)
        features = torch.cat(list(model.model.get_image_features(images, return_dict=True).pooler_output))
        encoded, clock = time.perf_counter(), Clock()
        embeds = model.get_input_embeddings()(prompt).masked_scatter((prompt == image_id).unsqueeze(-1), features)
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        mask = torch.ones_like(prompt)
        model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, streamer=clock, **length)
        first, last = clock.times[-new_tokens], clock.times[-1]
        return {
            "encode_s": encoded - start,
            "prefill_s": first - encoded,
            "tokens_per_s": (new_tokens - 1) / (last - first),
        }

    return run


def load_llama_cpp(job: dict[str, Any]) -> Program:
    """Load llama.cpp on a GGUF pair; the prompt is as long as that of the others, the image is encoded by libmtmd."""
    import llama_cpp
    import numpy as np
    from llama_cpp import mtmd_cpp

    before = resident_bytes()
    llama_cpp.llama_backend_init()
    model_params, params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.n_gpu_layers = 0
    length, new_tokens = job["prompt_tokens"], job["new_tokens"]
    params.n_ctx, params.n_batch = length + new_tokens, length
    params.n_threads = params.n_threads_batch = job["threads"]
    model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), model_params)
    context = llama_cpp.llama_init_from_model(model, params)
    vision_params = mtmd_cpp.mtmd_context_params_default()
    vision_params.use_gpu, vision_params.n_threads = False, job["threads"]
    vision = mtmd_cpp.mtmd_init_from_file(job["mmproj"].encode(), model, vision_params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(length, 0, 1)

    def encode() -> None:
        bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_file(vision, job["image"].encode(), False)
        chunks, marker = mtmd_cpp.mtmd_input_chunks_init(), mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd_cpp.mtmd_tokenize(vision, chunks, ctypes.byref(text), bitmaps, 1) == 0
        for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, index)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                assert mtmd_cpp.mtmd_encode_chunk(vision, chunk) == 0
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)

    def decode(tokens: list[int], position: int) -> int:
        """Return the most likely token after ``tokens``."""
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, index == len(tokens) - 1
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = llama_cpp.llama_get_logits_ith(context, len(tokens) - 1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def run() -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        encode()
        encoded = time.perf_counter()
        token = decode([3 + index % 1000 for index in range(length)], 0)
        first = time.perf_counter()
        for index in range(new_tokens - 1):
            token = decode([token], length + index)
        rate = (new_tokens - 1) / (time.perf_counter() - first)
        return {"encode_s": encoded - start, "prefill_s": first - encoded, "tokens_per_s": rate}

    features = llama_cpp.llama_print_system_info().decode()
    return Program(run, before, {"features": features, "version": llama_cpp.__version__})


def load_rates(job: dict[str, Any]) -> Program:
    """Measure the bounds: read bandwidth and the rates of matrix products."""
    import torch
    from benchmark_inference import machine, machine_rates

    torch.set_num_threads(job["threads"])

    def run() -> dict[str, float]:
        rates = {kind: machine_rates(getattr(torch, kind), job["device"], 1, 1024) for kind in ("float32", "bfloat16")}
        bandwidth = max(rate[0] for rate in rates.values())
        return {"bandwidth": bandwidth} | {kind: rate[1] for kind, rate in rates.items()}

    capability = torch.backends.cpu.get_cpu_capability()
    return Program(run, resident_bytes(), machine(job["device"]) | {"capability": capability})


def quantize(job: dict[str, Any]) -> Program:
    """Write a quantized GGUF file with the defaults of llama.cpp; ``ftype`` is one of its LLAMA_FTYPE constants."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, job["ftype"]), job["threads"]
    source, target = job["source"].encode(), job["target"].encode()
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)) == 0
    return Program(dict, 0, {})


PROGRAMS: dict[str, Callable[[dict[str, Any]], Program]] = {
    "yivl": load_yivl,
    "llava": load_llava,
    "transformers": load_transformers,
    "transformers-internvl": load_internvl_of_transformers,
    "llama.cpp": load_llama_cpp,
    "rates": load_rates,
    "quantize": quantize,
}

if __name__ == "__main__":
    main()
