"""Ask a checkpoint with the wrapper of VLMEvalKit: python ask_vlmevalkit.py PACKAGE ROOT MODEL CASES RESULT.

Its file ``vlmeval/vlm/yi_vl.py`` runs unmodified. What it imports from the rest of VLMEvalKit, which needs some fifty
packages, is replaced; without a GPU ``cuda()`` does nothing. The wrapper computes in bfloat16.
"""

import importlib.util
import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class BaseModel:
    """Stand-in for the class of the wrappers."""

    def message_to_promptimg(self, message: list[str], dataset: str | None = None) -> tuple[str, str]:
        """Return question and image."""
        return message[1], message[0]


def load_wrapper(package: Path) -> Any:
    """Return ``Yi_VL`` of a folder into which the package was installed."""
    smp, base = ModuleType("vlmeval.smp"), ModuleType("vlmeval.vlm.base")
    smp.load = lambda path: json.loads(Path(path).read_text(encoding="utf-8"))
    smp.dump = lambda data, path: Path(path).write_text(json.dumps(data), encoding="utf-8")
    smp.splitlen = lambda text, separator: len(text.split(separator))
    smp.get_cache_path = lambda repo_id: None
    base.BaseModel = BaseModel
    for module in (ModuleType("vlmeval"), ModuleType("vlmeval.vlm"), smp, base):
        sys.modules[module.__name__] = module
    spec = importlib.util.spec_from_file_location("vlmeval.vlm.yi_vl", package / "vlmeval/vlm/yi_vl.py")
    assert spec is not None
    assert spec.loader is not None
    wrapper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrapper)
    return wrapper.Yi_VL


def main(package: Path, root: str, folder: str, cases: Path, result: Path) -> None:
    """Write the greedy answers."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
    model = load_wrapper(package)(folder, root=root, max_new_tokens=64)
    asked = json.loads(cases.read_text(encoding="utf-8"))
    answers = [model.generate_inner([case["image"], case["question"]]) for case in asked]
    [found] = distributions(path=[str(package)])
    result.write_text(json.dumps({"version": found.version, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
