"""Parquet files and data sets of ``datasets``: the rows of the same data in JSON."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.training import IMAGES, conversation, losses, train, write_rows

from yivl.data.records import open_records
from yivl.data.rows import Row, RowError, parse_row
from yivl.data.sources import DataSource, load_all_rows, read_sources

PNG = (IMAGES / "square_rgb.png").read_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def openai(image: Any, text: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image}] if image else []
    question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]}


LLAVA = [
    conversation("square_rgb.png", "What is it?", "A boat."),
    conversation(None, "图?", "a"),
    conversation(None, "", " "),
]
DIALECTS = {
    "llava": LLAVA,
    "images": [row | {"images": [row["image"]], "image": None} if "image" in row else row for row in LLAVA],
    "openai": [openai("square_rgb.png", "What is it?"), openai(None, "What?")],
    "caption": [{"image": "square_rgb.png", "text": "A boat."}, {"image": None, "text": "No image."}],
}


def write(folder: Path, rows: Any, kind: str) -> str:
    """Write rows as a Parquet file or data set, and return its data path."""
    table = datasets.Dataset.from_list(rows)
    folder.mkdir(exist_ok=True)
    if kind == "disk":
        table.save_to_disk(folder / "saved")
        return str(folder / "saved")
    table.to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet") if kind == "file" else f"hub:{folder}"


def load(path: str) -> tuple[list[Row], list[str]]:
    """Return rows and errors, without the name of the file."""
    errors: list[RowError] = []
    rows = load_all_rows(DataSource(path, str(IMAGES)), errors.append)
    return [replace(row, origin=row.origin.split()[-1]) for row in rows], [
        str(error).removeprefix(path) for error in errors
    ]


@pytest.mark.parametrize("kind", ["file", "disk", "hub"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_has_the_rows_and_errors_of_json(dialect: str, kind: str, tmp_path: Path) -> None:
    rows = DIALECTS[dialect]
    expected = load(str(write_rows(tmp_path / "rows.json", rows)))
    assert expected[0]
    assert load(write(tmp_path / "data", rows, kind)) == expected


@pytest.mark.parametrize("kind", ["file", "disk", "hub"])
def test_images_may_be_in_the_rows(kind: str, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    column = [{"bytes": PNG, "path": "elsewhere.png"}, {"bytes": PNG, "path": None}]
    table = datasets.Dataset.from_dict({"image": column, "text": ["a", "b"]}, features=features)
    path = str(tmp_path / "data")
    (tmp_path / "data").mkdir()
    if kind == "disk":
        table.save_to_disk(path)
    else:
        table.to_parquet(tmp_path / "data/train.parquet")
        path = f"hub:{path}" if kind == "hub" else f"{path}/train.parquet"
    rows, errors = load(path)
    assert not errors
    assert [row.images for row in rows] == [(PNG,), (PNG,)]
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert rows[0].images == parse_row({"image": url, "text": "a"}, "row").images


def test_bytes_in_any_column_of_images_are_images() -> None:
    assert parse_row({"image": PNG, "text": "a"}, "row").images == (PNG,)
    assert parse_row(LLAVA[0] | {"image": None, "images": [{"bytes": PNG}]}, "row").images == (PNG,)
    with pytest.raises(RowError, match="unknown key 'image_2'"):
        parse_row(LLAVA[0] | {"image_2": PNG}, "row")


def test_parquet_trains_with_the_losses_of_json(tmp_path: Path) -> None:
    rows = [
        conversation("square_rgb.png", "What is it?", "A boat."),
        *[conversation(None, "q", f"a {n}") for n in range(3)],
    ]
    path = write(tmp_path / "data", rows, "file")
    (tmp_path / "mix.yaml").write_text(f"- {{data_path: 'data/*.parquet', image_folder: {IMAGES}}}\n")
    flags = {"max_steps": 2, "group_by_modality_length": True}
    ours = losses(train(tmp_path / "a", tmp_path / "mix.yaml", **flags))
    assert ours == losses(train(tmp_path / "b", write_rows(tmp_path / "rows.json", rows), **flags))
    record = json.loads((tmp_path / "a/training_run.json").read_text())["sources"][0]
    assert record["source"] == str(tmp_path / "data/*.parquet")
    assert len(bytes.fromhex(record["fingerprint"])) == 32
    assert Path(path).is_file()


def test_the_fingerprint_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    def fingerprint(name: str, answer: str, kind: str) -> str:
        path = write(tmp_path / name, [conversation(None, "q", answer)], kind)
        return load_all_rows(DataSource(path), pytest.fail).fingerprint

    for kind in ("file", "disk"):
        assert fingerprint(f"{kind}-a", "a", kind) == fingerprint(f"{kind}-b", "a", kind)
        assert fingerprint(f"{kind}-a2", "a", kind) != fingerprint(f"{kind}-c", "c", kind)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows/1.json")
    write_rows(tmp_path / "rows/2.json", [conversation(None, "q", "a")])
    one, both = (
        load_all_rows(DataSource(str(tmp_path / name)), lambda _: None) for name in ("rows/1.json", "rows/*.json")
    )
    assert one.fingerprint != both.fingerprint


def test_the_fingerprint_of_a_name_on_the_hub_is_of_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(place: str, split: str, answer: str = "a") -> str:
        """Load a data set into a cache of its own, as each node of a cluster does."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{place}")
        write(tmp_path / place, [conversation(None, f"q{n}", answer) for n in range(3)], "file")
        return load_all_rows(DataSource(f"hub:{tmp_path}/{place}:{split}"), pytest.fail).fingerprint

    first = fingerprint("one", "train")
    assert fingerprint("two", "train") == first
    assert fingerprint("three", "train", "b") != first
    assert fingerprint("one", "train[:2]") != first


def test_a_name_on_the_hub_in_a_mixture_is_not_a_relative_path(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("- {data_path: 'hub:owner/name@main:train'}\n")
    (source,) = read_sources(str(tmp_path / "mix.yaml"))
    assert source.files() == [("hub:owner/name@main:train", ".")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:owner/name", r"hub:owner/name: cannot be loaded \(.*\); expected hub:owner/name\[@revision\]\[:split\]"),
        ("hub:{folder}:test", r"cannot be loaded \(.*test.*\); expected"),
        ("{folder}/damaged.parquet", r"damaged\.parquet: not a readable Parquet file \("),
        ("{folder}/empty.parquet", r"empty\.parquet: no rows"),
        ("{folder}/none.parquet", r"none\.parquet: cannot be read \(No such file"),
        ("{folder}/broken", r"broken: cannot be read \(Directory .* is neither"),
        ("{folder}/state of a list", "state of a list: not a folder of Dataset.save_to_disk"),
        ("{folder}/files of a number", "files of a number: not a folder of Dataset.save_to_disk"),
        ("{folder}/features of a number", "features of a number: not a folder of Dataset.save_to_disk"),
        ("{folder}/map.parquet", r"map\.parquet: a column has a type that datasets cannot store \(.*map.*\); drop it"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(path: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "data", [conversation(None, "q", "a")], "file")
    (tmp_path / "data/damaged.parquet").write_bytes((tmp_path / "data/train.parquet").read_bytes()[:-300])
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "data/empty.parquet")
    (tmp_path / "data/broken").mkdir()
    (tmp_path / "data/broken/state.json").write_text("{}")
    for name, file, content in (
        ("state of a list", "state.json", []),
        ("files of a number", "state.json", {"_data_files": 3}),
        ("features of a number", "dataset_info.json", {"features": 3}),
    ):
        datasets.Dataset.from_list([conversation(None, "q", "a")]).save_to_disk(tmp_path / "data" / name)
        (tmp_path / "data" / name / file).write_text(json.dumps(content))
    column = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "more": column}), tmp_path / "data/map.parquet")
    if path.endswith("test"):
        (tmp_path / "data/damaged.parquet").unlink()
        (tmp_path / "data/empty.parquet").unlink()
    with pytest.raises(RowError, match=message) as raised:
        load(path.format(folder=tmp_path / "data"))
    assert "\n" not in str(raised.value)


def test_data_sets_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: those in memory have no files, whose content tells data sets apart."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    found = []
    for number in (1, 2):
        rows = [conversation(None, f"question {index}", "a") for index in range(number)]
        found.append(open_records(write(tmp_path / str(number), rows, "disk")))
    assert [len(records) for records in found] == [1, 2]
    assert found[0].fingerprint != found[1].fingerprint


def test_metadata_of_other_programs_in_a_parquet_file_is_ignored(tmp_path: Path) -> None:
    table = pyarrow.table({"image": ["square_rgb.png"], "text": ["a boat"]}).replace_schema_metadata(
        {"huggingface": "no JSON"}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((row,), errors) = load(str(tmp_path / "rows.parquet"))
    assert (row.turns[0].answer, errors) == ("a boat", [])
