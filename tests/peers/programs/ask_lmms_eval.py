"""Ask an API with lmms-eval, as a task of our own on local data: python ask_lmms_eval.py URL CASES RESULT."""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import datasets

TASK = """
task: peers
dataset_path: parquet
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
doc_to_target: question
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
process_results: !function utils.results
metric_list: [{{metric: answered, aggregation: mean, higher_is_better: true}}]
"""


def main(url: str, cases: Path, result: Path) -> None:
    """Write the greedy answers."""
    asked = json.loads(cases.read_text(encoding="utf-8"))
    table = {"number": range(len(asked)), "question": [case["question"] for case in asked]}
    images = datasets.Dataset.from_dict(table | {"image": [case["image"] for case in asked]})
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task")
        shutil.copytree(Path(__file__).parent / "lmms_eval_task", task)
        images.cast_column("image", datasets.Image()).to_parquet(str(task / "rows.parquet"))
        (task / "task.yaml").write_text(TASK.format(data=task / "rows.parquet"), encoding="utf-8")
        model = f"model=yi-vl-tiny,base_url={url},api_key=secret,timeout=600,num_concurrent=2"
        command = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", model, "--log_samples"]
        command += ["--include_path", str(task), "--tasks", "peers", "--output_path", f"{folder}/out"]
        subprocess.run(command, check=True)
        [samples] = Path(folder, "out").rglob("*_samples_peers.jsonl")
        lines = [json.loads(text) for text in samples.read_text(encoding="utf-8").splitlines()]
    answers = [line["filtered_resps"] for line in sorted(lines, key=lambda line: int(line["number"]))]
    result.write_text(json.dumps({"version": version("lmms_eval"), "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
