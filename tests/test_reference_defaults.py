"""Names and defaults of the reference's programs and functions, next to ours: equal, or a row of docs/fidelity.md."""

import inspect
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.golden import CHECKPOINT, ROOT

from yivl import mm_utils
from yivl.checkpoint.folder import read_config
from yivl.command_line import EMBEDDED_MODEL
from yivl.conversation import Conversation
from yivl.errors import CheckpointError
from yivl.eval import __main__ as evaluation
from yivl.eval.benchmarks import cmmmu, mmmu
from yivl.inference.sampling import Sampling

REQUIRED = "required"

# (default of the reference, ours where it differs). Source: 01-ai/Yi, VL/single_inference.py, cli.py, web_demo.py.
FLAGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "single_inference.py": {
        "model_path": ("01-ai/Yi-VL-6B", EMBEDDED_MODEL),
        "image_file": ("images/cats.jpg", str(ROOT / "images/cats.jpg")),
        "question": ("Describe the cats and what they are doing in detail.",),
        "model_base": (None,),
        "conv_mode": ("mm_default",),
        "temperature": (0.2,),
        "top_p": (None, 1.0),  # the same: all tokens
        "num_beams": (1,),
        "max_new_tokens": (1024,),  # fixed there
        "top_k": (50,),  # of transformers
    },
    "cli.py": {
        "model_path": (REQUIRED, EMBEDDED_MODEL),
        "image_file": (REQUIRED, None),
        "temperature": (0.2,),
        "max_new_tokens": (512,),
        "top_p": (0.8,),  # of the released generation_config.json
        "top_k": (50,),  # of transformers
        "num_beams": (1,),  # of transformers
    },
    "web_demo.py": {
        "model_path": ("01-ai/Yi-VL-6B", EMBEDDED_MODEL),
        "cpu_only": (False,),
        "share": (False,),
        "inbrowser": (True, False),  # fixed there
        "server_port": (8111,),
        "server_name": ("127.0.0.1",),
    },
}
# The rows of the differences above.
ROWS = {
    "model_path": "| model without `--model-path` |",
    "image_file": "| `cli.py`: debug flag, required `--image-file` |",
    "inbrowser": "| `--inbrowser` |",
    "debug": "| `cli.py`: debug flag, required `--image-file` |",
}


def flags_of(program: str, monkeypatch: pytest.MonkeyPatch, *typed: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [program, *typed])
    return vars(runpy.run_path(str(ROOT / program))["parse_args"]())


@pytest.mark.parametrize("program", FLAGS)
def test_flags_keep_the_defaults_of_the_reference(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = flags_of(program, monkeypatch)
    assert {name: ours[name] for name in FLAGS[program]} == {name: both[-1] for name, both in FLAGS[program].items()}
    ledger = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
    assert all(row in ledger for row in ROWS.values())
    different = {name for name, both in FLAGS[program].items() if len(both) == 2}
    assert different - {"top_p"} <= ROWS.keys()
    published = json.loads((ROOT / "tests/golden/yi-vl-34b/generation_config.json").read_text(encoding="utf-8"))
    assert FLAGS["cli.py"]["top_p"] == (published["top_p"],)
    assert not {"top_k", "num_beams", "repetition_penalty"} & published.keys()


def test_the_default_image_goes_with_the_default_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*typed: str) -> tuple[str, str | None]:
        flags = flags_of("single_inference.py", monkeypatch, *typed)
        return flags["question"], flags["image_file"]

    [question] = FLAGS["single_inference.py"]["question"]
    assert asked("--image-file", "mine.jpg") == (question, "mine.jpg")
    assert asked("--question", "Who are you?") == ("Who are you?", None)


def test_python_samples_as_single_inference() -> None:
    reference = FLAGS["single_inference.py"]
    values = {field.name: field.default for field in fields(Sampling)}
    assert {name: values[name] for name in values.keys() & reference.keys()} == {
        name: reference[name][-1] for name in values.keys() & reference.keys()
    }
    assert (values["repetition_penalty"], values["seed"]) == (1.0, None)


# Parameters and defaults. Source: 01-ai/Yi, VL/llava/mm_utils.py.
FUNCTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (
        mm_utils.load_pretrained_model,
        {
            "model_path": REQUIRED,
            "load_8bit": False,
            "load_4bit": False,
            "device_map": "auto",
            "multimodal": "IMAGE",
        },
    ),
    (
        mm_utils.tokenizer_image_token,
        {"prompt": REQUIRED, "tokenizer": REQUIRED, "image_token_index": -200, "return_tensors": None},
    ),
    (mm_utils.process_images, dict.fromkeys(("images", "image_processor", "model_cfg"), REQUIRED)),
    (mm_utils.expand2square, dict.fromkeys(("pil_img", "background_color"), REQUIRED)),
    (mm_utils.get_model_name_from_path, {"model_path": REQUIRED}),
    (mm_utils.load_image_from_base64, {"image": REQUIRED}),
    (mm_utils.KeywordsStoppingCriteria, dict.fromkeys(("keywords", "tokenizer", "input_ids"), REQUIRED)),
]


def test_functions_of_the_reference_keep_their_parameters() -> None:
    for function, expected in FUNCTIONS:
        parameters = inspect.signature(function).parameters.values()
        ours = {
            one.name: REQUIRED if one.default is one.empty else one.default
            for one in parameters
            if one.kind is one.POSITIONAL_OR_KEYWORD
        }
        assert list(ours.items()) == list(expected.items()), function
    there = {"system", "roles", "messages", "sep", "append_message", "copy", "get_prompt"}
    absent = {"offset", "sep_style", "sep2", "version", "skip_next", "get_images", "dict"}
    assert {name for name in there | absent if hasattr(Conversation(), name)} == there


def test_evaluation_keeps_the_settings_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: 01-ai/Yi at 526ec7a, VL/llava/eval/01_eval_mmmu.py, 01_eval_cmmmu.py."""
    for name, benchmark, split in (("mmmu", mmmu, "validation"), ("cmmmu", cmmmu, "val")):
        monkeypatch.setattr(sys, "argv", ["eval", name, "--model-path", "m", "--output", "o"])
        arguments = evaluation.parse_args()
        assert (benchmark.max_new_tokens(arguments), arguments.split) == (64, split)
        assert not {"temperature", "top_p", "num_beams", "categories", "conv_mode"} & vars(arguments).keys()


def test_fields_missing_in_a_config_are_those_of_the_released_models(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    path = folder / "config.json"
    names = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio")
    given = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in given.items() if key not in names}), encoding="utf-8")
    published = json.loads((ROOT / "tests/golden/yi-vl-34b/config.json").read_text(encoding="utf-8"))
    config = read_config(folder)
    assert {name: getattr(config, name) for name in names} == {name: published[name] for name in names}
    path.write_text(json.dumps({**given, "mm_use_im_start_end": True}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="mm_use_im_start_end"):
        read_config(folder)
