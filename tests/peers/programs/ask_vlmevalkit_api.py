"""Ask an API with VLMEvalKit, as a data set of our own: python ask_vlmevalkit_api.py URL CASES RESULT."""

import base64
import csv
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas


def main(url: str, cases: Path, result: Path) -> None:
    """Write the greedy answers."""
    asked = json.loads(cases.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "PEERS.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "image", "question", "answer"])
            for index, case in enumerate(asked):
                image = base64.b64encode(Path(case["image"]).read_bytes()).decode()
                writer.writerow([index, image, case["question"], "none"])
        command = [sys.executable, "-m", "vlmeval.run", "--base-url", url, "--key", "secret", "--model", "yi-vl-tiny"]
        command += ["--temperature", "0", "--max-tokens", "64", "--api-nproc", "2", "--mode", "infer"]
        command += ["--data", "PEERS", "--work-dir", f"{folder}/out"]
        subprocess.run(command, env=os.environ | {"LMUData": folder}, check=True)
        table = pandas.read_excel(Path(folder, "out/yi-vl-tiny/yi-vl-tiny_PEERS.xlsx"))
    answers = table.sort_values("index")["prediction"].tolist()
    result.write_text(json.dumps({"version": version("ms-vlmeval"), "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
