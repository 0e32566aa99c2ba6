"""The tables and the chart of docs/benchmarks.md: results of the benchmark scripts as Markdown."""

from pathlib import Path
from typing import Any

COLUMNS = (
    "program",
    "prefill, s",
    "× bound",
    "× llama.cpp",
    "first token, s",
    "× bound",
    "decoding, tokens/s",
    "× bound",
    "× llama.cpp",
    "memory, GB",
    "× file",
)


def markdown_table(results: dict[str, Any]) -> str:
    """Return the machine, the bounds and a row for each program."""
    machine, bounds = results["machine"], results["bounds"]
    about = (
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch's kernels for {machine['capability']}; "
        f"shape *{results['shape']}*, {results['prompt_tokens']:,} positions, "
        f"answers of {results['new_tokens']} tokens, rounds: {results['repeats']}. "
        f"Bounds: {bounds['bandwidth'] / 1e9:.0f} GB/s read, matrix products {bounds['float32'] / 1e9:.0f} GFLOP/s in "
        f"float32 and {bounds['bfloat16'] / 1e9:.0f} in bfloat16."
    )
    lines = [about, "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_cells(name, figures)) for name, figures in results["peers"].items()]
    lines += [_line([_title(name), f"not measured: {error}"]) for name, error in results["errors"].items()]
    return "\n".join(lines)


def chat_table(results: dict[str, Any]) -> str:
    """Return chat turns, loading and memory as benchmark_inference.py measured them."""
    machine, chat = results["machine"], results["chat"]
    kept, computed, shares = (
        " / ".join(f"{value:.2f}" for value in chat[key])
        for key in ("turn_seconds", "refed_turn_seconds", "first_token_over_refed")
    )
    rows = [(f"turns of {chat['new_tokens_per_turn']} new tokens, s", kept)]
    rows += [("– the same, re-computing everything every turn", computed)]
    rows += [("– first token, share of re-computing everything", shares)]
    for name in ("safetensors", "bin"):
        loading = results[f"loading_{name}"]
        peak = f"{loading['seconds']:.2f}, {loading['peak_over_checkpoint']:.2f}"
        rows += [(f"loading {name} shards: seconds, peak memory / size", peak)]
    rows += [("peak resident set of the whole run, GB", f"{results['peak_bytes'] / 1e9:.1f}")]
    about = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads; shape *{results['shape']}*, "
    header = [_line(("turn 1 / 2 / 3 / 4", results["dtype"])), _line(("---", "---"))]
    return "\n".join([f"{about}median of {results['repeats']} runs.", "", *header, *map(_line, rows)])


def replace_section(path: Path, name: str, text: str) -> None:
    """Write a file, or replace what an existing one has between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: If the file exists and does not have these lines.
    """
    if not path.exists():
        path.write_text(text + "\n")
        return
    begin, end, page = f"<!-- {name} -->\n", f"<!-- /{name} -->", path.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"{path}: no section {begin.strip()} ... {end}")
    path.write_text(page[: page.index(begin)] + begin + "\n" + text + "\n\n" + page[page.index(end) :])


def write_chart(path: Path, results: dict[str, Any]) -> None:
    """Draw tokens per second and the time to the first token of each program, with their bounds."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    peers, bounds = results["peers"], results["bounds"]
    names = list(reversed(peers))
    first_bound = (bounds["language_flops"] + bounds["vision_flops"]) / max(bounds["float32"], bounds["bfloat16"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.36 * len(names)), sharey=True)
    colors = ["tab:blue" if name.startswith("yivl") else "silver" for name in names]
    rates, seconds = ([peers[name][key] for name in names] for key in ("tokens_per_s", "first_token_s"))
    limits = [rate * peers[name]["decode_over_bound"] for name, rate in zip(names, rates, strict=True)]
    titles = [_title(name) for name in names]
    left.bar_label(left.barh(titles, rates, color=colors), fmt="%.1f", padding=3)
    left.scatter(limits, titles, marker="|", s=200, color="tab:red", label="read bandwidth")
    right.bar_label(right.barh(titles, seconds, color=colors), fmt="%.2f", padding=3)
    right.axvline(first_bound, color="tab:red", label="rate of matrix products")
    left.set_xlabel("decoding, tokens/s (more is better)")
    right.set_xlabel("first token, ViT included, s (less is better)")
    for axes in (left, right):
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="bound", loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    machine = results["machine"]
    about = (f"{results['shape']} shape", machine["cpu"], f"{machine['threads']} threads", machine["capability"])
    figure.suptitle(", ".join(about))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _title(name: str) -> str:
    """Return the name of a program as the table and the chart have it."""
    kind, form = name.split(":")
    form, _, is_compiled = form.partition("+")
    flag = {"8bit": "--load-8bit", "4bit": "--load-4bit"}.get(form, form) + (" --compile" if is_compiled else "")
    return f"{ {'llava': 'LLaVA baseline'}.get(kind, kind) } {flag}"


def _cells(name: str, figures: dict[str, Any]) -> list[str]:
    chosen = f" ({figures['dtype']})" if name.endswith(":auto") else ""
    return [
        _title(name) + chosen,
        f"{figures['prefill_s']:.2f}",
        f"{figures['prefill_over_bound']:.2f}",
        _ratio(figures, "prefill_over_llama_cpp"),
        f"{figures['first_token_s']:.2f}",
        f"{figures['first_token_over_bound']:.2f}",
        f"{figures['tokens_per_s']:.1f}",
        f"{figures['decode_over_bound']:.2f}",
        _ratio(figures, "decode_over_llama_cpp"),
        f"{figures['resident_bytes'] / 1e9:.2f}",
        f"{figures['resident_over_file']:.2f}",
    ]


def _ratio(figures: dict[str, Any], key: str) -> str:
    return f"{figures[key]:.2f}" if key in figures else "–"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
