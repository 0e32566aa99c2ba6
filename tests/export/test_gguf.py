"""GGUF files: every value in them, and llama.cpp's ids, image features and answers compared with ours."""

import base64
import ctypes
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN, ROOT

from yivl.checkpoint.conversion import bin_to_safetensors
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.command_line import EMBEDDED_MODEL
from yivl.constants import DEFAULT_IMAGE_TOKEN, SYSTEM_PROMPT
from yivl.conversation import IMAGE, YI_VL, Piece, Turn, prompt_text
from yivl.errors import CheckpointError, YiVLError
from yivl.export.gguf import Dtype, export_gguf
from yivl.image_processing import load_image
from yivl.inference.chat import Chat
from yivl.tokenization import tokenize

EMBEDDED = Path(EMBEDDED_MODEL)
CATS = ROOT / "images/cats.jpg"
PHOTO = GOLDEN / "images/photo_rgb.jpg"
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
TORCH_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

Files = dict[tuple[Path, Dtype], tuple[Path, Path]]

LANGUAGE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
VISION_NAMES = {
    "v.pre_ln": "pre_layrnorm",
    "v.blk.{}.ln1": "encoder.layers.{}.layer_norm1",
    "v.blk.{}.attn_q": "encoder.layers.{}.self_attn.q_proj",
    "v.blk.{}.attn_k": "encoder.layers.{}.self_attn.k_proj",
    "v.blk.{}.attn_v": "encoder.layers.{}.self_attn.v_proj",
    "v.blk.{}.attn_out": "encoder.layers.{}.self_attn.out_proj",
    "v.blk.{}.ln2": "encoder.layers.{}.layer_norm2",
    "v.blk.{}.ffn_up": "encoder.layers.{}.mlp.fc1",
    "v.blk.{}.ffn_down": "encoder.layers.{}.mlp.fc2",
}
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for tensor in GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(tensor.data)).view(TORCH_DTYPES[tensor.tensor_type])
        tensors[tensor.name] = values.reshape(tensor.shape.tolist()[::-1])
    return tensors


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields without those of the file format itself."""
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    return {name: value for name, value in fields.items() if not name.startswith("GGUF.")}


def expected_language(model: LoadedModel) -> dict[str, torch.Tensor]:
    weights, config = model.model.state_dict(), model.model.config
    names = {
        ours.format(layer): theirs.format(layer)
        for theirs, ours in LANGUAGE_NAMES.items()
        for layer in range(config.num_hidden_layers)
    }
    expected = {f"{theirs}.weight": weights[f"{ours}.weight"] for ours, theirs in names.items()}
    half = config.head_dim // 2
    for name, value in expected.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # Neighbors in llama.cpp are half a head apart in transformers.
            rows = [
                head + half * (row % 2) + row // 2
                for head in range(0, len(value), config.head_dim)
                for row in range(config.head_dim)
            ]
            expected[name] = value[rows]
    return expected


def expected_vision(model: LoadedModel) -> dict[str, torch.Tensor]:
    weights, config = model.model.state_dict(), model.model.config
    names = {
        f"{theirs}.{kind}".format(layer): f"{VISION_PREFIX}{ours}.{kind}".format(layer)
        for theirs, ours in VISION_NAMES.items()
        for layer in range(config.vision_config.num_hidden_layers - 1)  # -2 is the last but one hidden state
        for kind in ("weight", "bias")
    }
    names |= {
        f"mm.{index}.{kind}": f"model.mm_projector.{index}.{kind}"
        for index in (0, 1, 3, 4)
        for kind in ("weight", "bias")
    }
    names |= {
        "v.class_embd": f"{VISION_PREFIX}embeddings.class_embedding",
        "v.patch_embd.weight": f"{VISION_PREFIX}embeddings.patch_embedding.weight",
        "v.position_embd.weight": f"{VISION_PREFIX}embeddings.position_embedding.weight",
    }
    return {theirs: weights[ours] for theirs, ours in names.items()}


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    return load_model(EMBEDDED, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The exported pairs of both models in all dtypes."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        (source, dtype): export_gguf(source, folder, dtype=dtype)
        for source in (CHECKPOINT, EMBEDDED)
        for dtype in DTYPES
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [CHECKPOINT, EMBEDDED], ids=["golden", "embedded"])
def test_every_tensor_is_that_of_the_model(
    source: Path, dtype: Dtype, files: Files, loaded: LoadedModel, embedded: LoadedModel
) -> None:
    model = loaded if source == CHECKPOINT else embedded
    for path, expected in zip(files[source, dtype], (expected_language(model), expected_vision(model)), strict=True):
        tensors = read_tensors(path)
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            is_matrix = value.ndim > 1 and name != "v.position_embd.weight"
            kept = not is_matrix or (dtype == "bfloat16" and name == "v.patch_embd.weight")
            stored = value.to(torch.float32 if kept else getattr(torch, dtype))
            assert tensors[name].dtype == stored.dtype, name
            assert torch.equal(tensors[name], stored), name


def test_the_fields_are_those_of_the_configurations(files: Files) -> None:
    language, vision = (read_fields(path) for path in files[CHECKPOINT, "float16"])
    language = {name: value for name, value in language.items() if not isinstance(value, list)}
    del language["tokenizer.chat_template"]
    assert language == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "checkpoint",
        "general.file_type": LlamaFileType.MOSTLY_F16,
        "llama.vocab_size": 1024,
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 176,
        "llama.block_count": 4,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e6,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 294,  # ###
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert vision == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "checkpoint",
        "general.file_type": LlamaFileType.MOSTLY_F16,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": 64,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 48,
        "clip.vision.feed_forward_length": 96,
        "clip.vision.block_count": 3,
        "clip.vision.feature_layer": [3],
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.image_mean": pytest.approx([0.48145466, 0.4578275, 0.40821073]),
        "clip.vision.image_std": pytest.approx([0.26862954, 0.26130258, 0.27577711]),
    }
    file_types = [read_fields(files[EMBEDDED, dtype][0])["general.file_type"] for dtype in DTYPES]
    assert file_types == [LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16]


@pytest.mark.parametrize("source", [CHECKPOINT, EMBEDDED], ids=["golden", "embedded"])
def test_the_tokens_are_those_of_the_tokenizer(
    source: Path, files: Files, loaded: LoadedModel, embedded: LoadedModel
) -> None:
    tokenizer = (loaded if source == CHECKPOINT else embedded).tokenizer
    fields = read_fields(files[source, "float32"][0])
    ids = list(range(len(tokenizer)))
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(ids)
    assert fields["tokenizer.ggml.scores"] == pytest.approx([tokenizer.sp_model.get_score(index) for index in ids])
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert TokenType.CONTROL not in types[3:6]  # <|Human|> and its like, which our tokenizer never makes of text
    assert types[6:9] == [TokenType.CONTROL] * 3
    assert types[9:265] == [TokenType.BYTE] * 256
    assert set(types[265:]) == {TokenType.NORMAL}


def test_added_and_missing_tokens_have_their_place(tmp_path: Path) -> None:
    source = copy_of_checkpoint(tmp_path, vocab_size=1027)
    for shard in source.glob("*.bin"):
        weights = torch.load(shard, weights_only=True)
        for key in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            weights[key] = torch.nn.functional.pad(weights[key], (0, 0, 0, 3))
        torch.save(weights, shard)
    fields = json.loads((source / "tokenizer_config.json").read_text())
    for index, content, special in ((1024, "<|new|>", True), (1025, "newer", False)):
        like = fields["added_tokens_decoder"]["8"]
        fields["added_tokens_decoder"][str(index)] = like | {"content": content, "special": special}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    written = read_fields(export_gguf(source, tmp_path, dtype="float16")[0])
    assert written["tokenizer.ggml.tokens"][1024:] == ["<|new|>", "newer", "[PAD1026]"]
    assert written["tokenizer.ggml.token_type"][1024:] == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]


CONVERSATIONS = {
    "open": [Turn("What is it?")],
    "image": [Turn("图里有什么？", num_images=1)],
    "turns": [Turn("Hi", "Hello\nyou", 2), Turn("{{ bye }}")],
}


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("system", [SYSTEM_PROMPT, "Be brief."])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_chat_template_is_our_prompt(
    turns: list[Turn], system: str, in_parts: bool, files: Files, loaded: LoadedModel
) -> None:
    messages = [] if system == SYSTEM_PROMPT else [{"role": "system", "content": system}]
    for role, pieces in YI_VL.messages(turns)[:-1]:
        assert pieces is not None
        parts = [{"type": "text", "text": prompt_text([piece])} for piece in pieces]
        content: Any = parts if in_parts else prompt_text(pieces)
        messages.append({"role": {"Human": "user", "Assistant": "assistant"}[role], "content": content})
    template = read_fields(files[CHECKPOINT, "float32"][0])["tokenizer.chat_template"]
    prompt = loaded.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert prompt == prompt_text(YI_VL.render(YI_VL.messages(turns), system))


def test_bin_and_safetensors_give_the_same_models(tmp_path: Path, files: Files) -> None:
    bin_to_safetensors(CHECKPOINT, tmp_path / "checkpoint")
    for path, same in zip(
        export_gguf(tmp_path / "checkpoint", tmp_path, dtype="float16"), files[CHECKPOINT, "float16"], strict=True
    ):
        assert path.name == same.name
        assert read_fields(path) == read_fields(same)
        tensors, expected = read_tensors(path), read_tensors(same)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_vit_is_that_of_its_own_folder(tmp_path: Path) -> None:
    source = copy_of_checkpoint(tmp_path)
    (vit,) = source.glob("vit/*/pytorch_model.bin")
    weights = torch.load(vit, weights_only=True)
    key = "vision_model.embeddings.class_embedding"
    torch.save(weights | {key: torch.full_like(weights[key], 3.0)}, vit)
    _, path = export_gguf(source, tmp_path, dtype="float32")
    assert torch.equal(read_tensors(path)["v.class_embd"], torch.full((48,), 3.0))


def test_buffers_that_old_transformers_saved_are_left_out(tmp_path: Path, files: Files) -> None:
    source = copy_of_checkpoint(tmp_path)
    shard = source / "pytorch_model-00001-of-00002.bin"
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.save(torch.load(shard, weights_only=True) | {key: torch.zeros(8)}, shard)
    language, _ = export_gguf(source, tmp_path, dtype="float16")
    assert read_tensors(language).keys() == read_tensors(files[CHECKPOINT, "float16"][0]).keys()


def copy_of_checkpoint(folder: Path, **fields: Any) -> Path:
    """Return a copy of the golden checkpoint with other fields in its ``config.json``."""
    source = Path(shutil.copytree(CHECKPOINT, folder / "yi"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    return source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mm_projector_type": "linear"},
            "mm_projector_type='linear' cannot be exported; expected 'mlp2x_gelu_Norm' or",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' cannot be exported"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio='square' cannot be exported; expected 'pad'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be exported; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias=True cannot be exported"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be exported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' cannot be exported"),
        (
            {"num_hidden_layers": 5},
            r"do not fit config.json: missing model\.layers\.4\.input_layernorm\.weight",
        ),
        ({"num_hidden_layers": 3}, r"unexpected model\.layers\.3\.input_layernorm\.weight"),
        ({"vocab_size": 1000}, r"the tokenizer has the id 1023; expected less than vocab_size, 1000"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = copy_of_checkpoint(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=f"{source}.*{message}"):
        export_gguf(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-6)])
def test_a_vit_that_llama_cpp_cannot_compute_is_refused(field: str, value: object, tmp_path: Path) -> None:
    source = copy_of_checkpoint(tmp_path)
    (path,) = source.glob("vit/*/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=f"{field} of the ViT={value!r} cannot be exported"):
        export_gguf(source, tmp_path / "out", dtype="float16")


def test_quick_gelu_and_a_projector_without_layernorms_are_known(tmp_path: Path) -> None:
    source = copy_of_checkpoint(tmp_path, mm_projector_type="mlp2x_gelu")
    for shard in source.glob("*.bin"):
        weights = torch.load(shard, weights_only=True)
        for kind in ("weight", "bias"):
            if (key := f"model.mm_projector.3.{kind}") in weights:
                weights[f"model.mm_projector.2.{kind}"] = weights.pop(key)
            for norm in (1, 4):
                weights.pop(f"model.mm_projector.{norm}.{kind}", None)
        torch.save(weights, shard)
    (path,) = source.glob("vit/*/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "quick_gelu"}))
    _, vision = export_gguf(source, tmp_path, dtype="float16")
    assert read_fields(vision)["clip.use_gelu"] is False
    assert {name[:4] for name in read_tensors(vision) if name.startswith("mm.")} == {"mm.0", "mm.2"}


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    existing = tmp_path / "mmproj-checkpoint-float16.gguf"
    existing.write_text("mine")
    with pytest.raises(CheckpointError, match=f"{existing}: exists already"):
        export_gguf(CHECKPOINT, tmp_path, dtype="float16")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {existing.name: "mine"}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match="dtype='int8'; expected one of float32, float16, bfloat16"):
        export_gguf(CHECKPOINT, tmp_path, dtype="int8")  # type: ignore[arg-type]


def test_a_failed_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = GGUFWriter.write_tensor_data

    def fail(self: GGUFWriter, tensor: np.ndarray, *_: object) -> None:
        if "mmproj" in str(self.path):
            raise OSError("No space left on device")
        write(self, tensor)

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(CHECKPOINT, tmp_path, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_language_file_that_cannot_be_written_leaves_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if "mmproj" not in target.name:
            raise OSError("Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        export_gguf(CHECKPOINT, tmp_path, dtype="float16")
    assert list(tmp_path.iterdir()) == []


# Compared with llama.cpp, imported late: the tests above run without it.


TEXTS = [
    "What is in this image?",
    "图片里有什么？ 2024年，123,456。",
    "🐈‍⬛ 😀 é ñ Å Å ﬁ ①",
    "### Human: a\n### Assistant:",
    "####",
    "\n\n\n",
    "  leading and  doubled   spaces ",
    " ",
    "",
    "\t tab\r\n",
    "<|im_end|> <unk> <|startoftext|> <0x41> ▁under▁",
    "a\u3000b\u00a0c\u200bd",
    "العربية हिन्दी 日本語 한국어",
    f"{SYSTEM_PROMPT}\n\n### Human: ",
]


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHECKPOINT, EMBEDDED], ids=["golden", "embedded"])
def test_llama_cpp_splits_text_as_we_do(source: Path, files: Files, loaded: LoadedModel, embedded: LoadedModel) -> None:
    from llama_cpp import Llama

    tokenizer = (loaded if source == CHECKPOINT else embedded).tokenizer
    llama = Llama(str(files[source, "float32"][0]), vocab_only=True, verbose=False)
    generator = random.Random(0)
    pieces = [
        *map(chr, range(32, 127)),
        *"的一是了我不人在他有这个上们来到时大地为子中",
        "\n",
        "  ",
        "###",
        "😀",
        "\u3000",
    ]
    mixtures = ["".join(generator.choices(pieces, k=generator.randint(1, 60))) for _ in range(2000)]
    for text in TEXTS + mixtures:
        for special in (False, True):
            ids = llama.tokenize(text.encode(), add_bos=True, special=special)
            expected = tokenizer(text, add_special_tokens=False).input_ids if special else tokenize([text], tokenizer)
            assert ids == expected, text
    # A piece that SentencePiece defines beside the control tokens: text for llama.cpp and for our prompts.
    for special in (False, True):
        assert llama.tokenize(b"<|Human|>", add_bos=True, special=special) == tokenize(["<|Human|>"], tokenizer)
    llama.close()


class LlamaCpp:
    """An exported pair in llama.cpp: one thread, keys and values in float32, no flash attention."""

    def __init__(self, language: Path, vision: Path) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.llama_cpp, self.mtmd = llama_cpp, mtmd_cpp
        float32 = llama_cpp.GGML_TYPE_F32
        self.llama = llama_cpp.Llama(
            str(language), n_ctx=1024, n_batch=1024, n_threads=1, type_k=float32, type_v=float32, verbose=False
        )
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.vision = mtmd_cpp.mtmd_init_from_file(str(vision).encode(), self.llama.model, settings)
        assert self.vision is not None

    def close(self) -> None:
        self.mtmd.mtmd_free(self.vision)
        self.llama.close()

    def read(self, prompt: list[Piece], image: Image.Image | None) -> list[Any]:
        """Return a prompt in llama.cpp's parts, the image between chunks."""
        marker = self.mtmd.mtmd_default_marker().decode()
        text = prompt_text(prompt).replace(DEFAULT_IMAGE_TOKEN, marker).encode()
        bitmaps: list[Any] = []
        if image is not None:
            pixels = image.convert("RGB").tobytes()
            buffer = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
            bitmaps = [self.mtmd.mtmd_bitmap_init(image.width, image.height, buffer)]
        parts = self.mtmd.mtmd_input_chunks_init()
        settings = self.mtmd.mtmd_input_text(text, len(text), True, False)
        array = (self.mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert self.mtmd.mtmd_tokenize(self.vision, parts, ctypes.byref(settings), array, len(bitmaps)) == 0
        return [self.mtmd.mtmd_input_chunks_get(parts, i) for i in range(self.mtmd.mtmd_input_chunks_size(parts))]

    def is_image_part(self, part: Any) -> bool:
        return bool(self.mtmd.mtmd_input_chunk_get_type(part) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)

    def encode(self, image: Image.Image) -> torch.Tensor:
        """Return what llama.cpp's ViT and projector make of a image, ``(num_patches, hidden)``."""
        (part,) = filter(self.is_image_part, self.read([IMAGE], image))
        assert self.mtmd.mtmd_encode_chunk(self.vision, part) == 0
        shape = self.mtmd.mtmd_input_chunk_get_n_tokens(part), self.llama.n_embd()
        return torch.from_numpy(np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.vision), shape).copy())

    def answer(self, prompt: list[Piece], image: Image.Image | None, features: torch.Tensor | None = None) -> list[int]:
        """Return the greedy ids after a prompt, with other features of the image if given."""
        context = self.llama.ctx
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(context), True)
        position = self.llama_cpp.llama_pos(0)
        for part in self.read(prompt, image):
            after = ctypes.byref(position)
            if features is not None and self.is_image_part(part):
                array = np.ctypeslib.as_ctypes(features.flatten().numpy())
                no_callback = self.mtmd.mtmd_helper_post_decode_callback()
                status = self.mtmd.mtmd_helper_decode_image_chunk(
                    self.vision, context, part, array, position.value, 0, 1024, after, no_callback, None
                )
            else:
                status = self.mtmd.mtmd_helper_eval_chunk_single(
                    self.vision, context, part, position.value, 0, 1024, True, after
                )
            assert status == 0
        ids: list[int] = []
        vocabulary = self.llama_cpp.llama_model_get_vocab(self.llama.model)
        while len(ids) < MAX_NEW_TOKENS:
            logits = np.ctypeslib.as_array(self.llama_cpp.llama_get_logits_ith(context, -1), (self.llama.n_vocab(),))
            ids.append(int(logits.argmax()))
            if self.llama_cpp.llama_vocab_is_eog(vocabulary, ids[-1]):
                break
            token = (self.llama_cpp.llama_token * 1)(ids[-1])
            assert self.llama_cpp.llama_decode(context, self.llama_cpp.llama_batch_get_one(token, 1)) == 0
        return ids


MAX_NEW_TOKENS = 40


@pytest.fixture(
    params=[(CHECKPOINT, "float32"), (EMBEDDED, "float32"), (EMBEDDED, "float16")],
    ids=["golden-float32", "embedded-float32", "embedded-float16"],
)
def pair(request: pytest.FixtureRequest, files: Files) -> Iterator[tuple[LoadedModel, LlamaCpp]]:
    """A model here and in llama.cpp."""
    source, dtype = request.param
    llama = LlamaCpp(*files[source, dtype])
    yield load_model(source, device="cpu", dtype=dtype), llama
    llama.close()


def our_answer(model: LoadedModel, pieces: list[Piece], pixel_values: torch.Tensor | None) -> list[int]:
    ids = tokenize(pieces, model.tokenizer)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    new = model.model.generate(torch.tensor([ids]), images=pixel_values, **settings)[0, len(ids) :].tolist()
    (stop,) = tokenize(["###"], model.tokenizer)
    return new[: new.index(stop) + 1] if stop in new else new


QUESTIONS = ["What is in this image?", "Describe the cats and what they are doing in detail.", "它们在吃什么？"]


@pytest.mark.slow
def test_llama_cpp_answers_text_as_we_do(pair: tuple[LoadedModel, LlamaCpp]) -> None:
    model, llama = pair
    for question in QUESTIONS:
        pieces = YI_VL.render(YI_VL.messages([Turn(question)]))
        assert llama.answer(pieces, None) == our_answer(model, pieces, None)


@pytest.mark.slow
def test_llama_cpp_answers_as_we_do_when_it_sees_what_we_see(pair: tuple[LoadedModel, LlamaCpp]) -> None:
    """Our features instead of its own: the decoder reads an image between two texts as ours does."""
    model, llama = pair
    image = load_image(PHOTO)
    pixel_values = model.image_processor([image])
    features = model.model.encode_images(pixel_values)[0].float().detach()
    for question in QUESTIONS:
        pieces = YI_VL.render(YI_VL.messages([Turn(question, num_images=1)]))
        assert llama.answer(pieces, image, features) == our_answer(model, pieces, pixel_values)


def class_token_last(model: LoadedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the features of a ViT whose class token comes after the patches, ``(num_patches, hidden)``.

    The position embeddings are not shifted with it, and the first feature, by then a patch, is dropped. That
    is what llama.cpp computes since its pull request 13321; 25844 would correct it (docs/interop.md).
    """
    tower = model.model.get_vision_tower()
    embeddings = tower.vit.embeddings
    patches = embeddings.patch_embedding(pixel_values.to(model.model.dtype)).flatten(2).transpose(1, 2)
    hidden = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    hidden = tower.vit.pre_layrnorm(hidden + embeddings.position_embedding.weight)
    for layer in tower.vit.encoder.layers[: tower.num_layers]:
        hidden = layer(hidden, attention_mask=None)
    features: torch.Tensor = model.model.model.mm_projector(hidden[:, 1:])[0]
    return features


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_sees_a_square_image_as_we_do_but_for_its_class_token(pair: tuple[LoadedModel, LlamaCpp]) -> None:
    """It resizes as Pillow does; GELU by tanh and pixels in float16 are left as difference."""
    model, llama = pair
    for size in (model.image_processor.image_size, 672):
        image = load_image(CATS).resize((size, size))
        pixel_values = model.image_processor([image])
        theirs = llama.encode(image)
        right = model.model.encode_images(pixel_values)[0]
        differences = [
            float((theirs - ours.float()).norm() / theirs.norm())
            for ours in (right, class_token_last(model, pixel_values))
        ]
        assert min(differences) < 2e-3
        assert max(differences) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_chats_about_an_image_as_we_do(dtype: Dtype, files: Files) -> None:
    """From the two files alone: template, stop, sampling off."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    language, vision = files[EMBEDDED, dtype]
    handler = MTMDChatHandler(str(vision), verbose=False, use_gpu=False)
    llama = Llama(str(language), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    buffer = io.BytesIO()
    load_image(CATS).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    chat = Chat(load_model(EMBEDDED, device="cpu", dtype=dtype))
    questions = [*QUESTIONS, "Is there a dog?"]
    messages: list[dict[str, Any]] = []
    for index, question in enumerate(questions):
        content: Any = question
        if not index:
            content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": f"\n{question}"}]
        messages.append({"role": "user", "content": content})
        reply = llama.create_chat_completion(messages, temperature=0, repeat_penalty=1.0, max_tokens=MAX_NEW_TOKENS)
        (choice,) = reply["choices"]
        answer = choice["message"]["content"].strip()
        assert choice["finish_reason"] == "stop"
        assert answer == chat.ask(question, None if index else CATS, temperature=0)
        messages.append({"role": "assistant", "content": answer})
    llama.close()
