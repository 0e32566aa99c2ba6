"""The cache of rows: the same rows, errors and notices as parsing the file, and one build for all processes."""

import ast
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import ROOT
from support.training import IMAGES, conversation, write_rows

from yivl import command_line
from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import YI_VL
from yivl.data import json_texts, records, row_cache
from yivl.data.encoding import Encoder
from yivl.data.row_file import open_rows
from yivl.data.row_table import RowTable
from yivl.data.rows import RowError, count_notices, parse_row, read_rows
from yivl.data.sources import DataSource, load_all_rows, load_rows, read_sources


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/yivl-rows"


def read_directly(path: Path) -> Any:
    """Return origins and values of a file that is parsed as a whole, or the error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 text (byte {error.start})"
    if path.suffix == ".jsonl":
        lines = [(number, parse_leniently(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [
            (
                f"{path} line {number}",
                f"not valid JSON ({value.msg} at character {value.pos})" if isinstance(value, ValueError) else value,
            )
            for number, value in lines
        ]
        return rows or f"{path}: no rows"
    value = parse_leniently(text) if text.strip() else []
    if isinstance(value, json.JSONDecodeError):
        return f"{path}: not valid JSON ({value})"
    if not isinstance(value, list):
        return f"{path}: expected a JSON list of rows"
    return [(f"{path} row {index}", row) for index, row in enumerate(value)] or f"{path}: no rows"


def parse_leniently(text: str) -> Any:
    lenient = re.sub(r'("(?:[^"\\]|\\.)*")|,(?:\s*\.\.\.)?(?=\s*(?:[\]}]|\Z))', lambda m: m[1] or "", text, flags=re.S)
    for form in (text, lenient):
        try:
            return json.loads(form)
        except json.JSONDecodeError as error:
            if form is text:
                first = error
    return first


ELEMENTS = [
    '{"a": 1}',
    "[1, 2]",
    '"s"',
    "3",
    '{"x": [1,],}',
    '{"a": "]},"}',
    '{"b": "\\\\"}',
    '"\\',
    "null",
    '"图\u2028 ,]"',
]
PIECES = [
    *ELEMENTS,
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    ",,",
    "\n",
    "\r\n",
    "\r",
    " ",
    "...",
    ",\n...\n]",
    "\ufeff",
    "nul",
    "-",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=10).map("".join) | st.lists(
    st.tuples(st.sampled_from(ELEMENTS), st.sampled_from(["", "", "", "\n", ",", "}"])).map("".join), max_size=6
).flatmap(
    lambda rows: st.sampled_from(["]", " ]\n", ",]", "", "]]", ",\n...\n]", "],"]).map(
        lambda end: f"[{','.join(rows)}{end}"
    )
)


@settings(max_examples=400, deadline=None)
@given(
    content=TEXTS.map(str.encode)
    | st.tuples(TEXTS, st.sampled_from([b"\xff", b"\xe2\x82"]), TEXTS).map(
        lambda t: t[0].encode() + t[1] + t[2].encode()
    ),
    suffix=st.sampled_from([".json", ".jsonl"]),
    part=st.sampled_from([1, 3, 7, 2**20]),
)
def test_a_file_that_is_read_in_parts_has_the_rows_and_errors_of_the_whole(
    content: bytes, suffix: str, part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_texts, "_PART", part)
        try:
            found: Any = [
                (origin, str(value) if isinstance(value, RowError) else value) for origin, value in read_rows(path)
            ]
        except RowError as error:
            found = str(error)
    expected = read_directly(path)
    if isinstance(found, str) or isinstance(expected, str):
        assert found.startswith(expected)
        return
    for (origin, value), (expected_origin, expected_value) in zip(found, expected, strict=True):
        assert origin == expected_origin
        assert value == expected_value or value.startswith(expected_value)


OPENED = {"conversations": [{"from": "gpt", "value": "Hi."}, *conversation(None, "q", "a")["conversations"]]}
ROWS: list[Any] = [
    conversation("photo_rgb.jpg", "q", "a"),
    3,
    conversation(None, "图\u2028", " "),
    OPENED,
    conversation(None, "q", "a", role="wizard"),
    {"image": "square_rgb.png", "text": "A boat."},
    {"image": "data:image/png;base64,AAAA", "text": "A boat."},
    OPENED,
]


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_table_has_the_rows_errors_and_notices_of_parsing_each_row(
    suffix: str, processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes:  # blocks of three rows, in as many processes as there are cores
        monkeypatch.setattr(row_cache, "BLOCK", 3)
    texts = [json.dumps(row) for row in ROWS]
    path = tmp_path / f"rows{suffix}"
    path.write_text(f"[{','.join(texts)}]" if suffix == ".json" else "\n\n".join([*texts, "{", ""]))
    rows, errors = [], []
    for origin, fields in read_rows(path):
        try:
            rows.append(parse_row(fields, origin, IMAGES))
        except RowError as error:
            errors.append(str(error))
    for _ in range(2):  # built, and read again
        found: list[RowError] = []
        table = load_all_rows(DataSource(str(path), str(IMAGES)), found.append)
        assert list(table) == rows
        assert [str(error) for error in found] == errors
        assert table.notices() == count_notices((notice, row.origin) for row in rows for notice in row.notices)
        assert table.has_images.tolist() == [bool(row.images) for row in rows]
        assert table.first_images(9) == [image for row in rows for image in row.images if isinstance(image, Path)]
        assert list(table.select([1, 4])) == list(table[1:5:3]) == [rows[1], rows[4]]
        assert table[-1] == rows[-1]


def test_deep_nesting_and_long_numbers_are_invalid_rows(tmp_path: Path) -> None:
    good = json.dumps(conversation(None, "q", "a"))
    (tmp_path / "b.json").write_text(f'[{good[:-1]}, "meta": ' + "[" * 600 + "]" * 600 + f"}}, {good}]")
    errors: list[RowError] = []
    assert len(load_all_rows(DataSource(str(tmp_path / "b.json")), errors.append)) == 1
    assert [str(error) for error in errors] == [f"{tmp_path}/b.json row 0: nested too deeply; remove the row"]
    deep, number = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": ' + "1" * 5000 + "}"
    for path, text in (
        (tmp_path / "a.json", f"[{good},{deep},{number},{good}]"),
        (tmp_path / "a.jsonl", f"{good}\n{deep}\n{number}\n{good}"),
    ):
        path.write_text(text)
        errors.clear()
        assert len(load_all_rows(DataSource(str(path)), errors.append)) == 2
        assert len(errors) == 2
        assert "JSON that cannot be read (maximum recursion depth" in str(errors[0])
        assert "JSON that cannot be read (Exceeds the limit" in str(errors[1])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RowError, match=r"deep\.json: JSON that cannot be read \(maximum recursion depth"):
        open_rows(str(tmp_path / "deep.json"), ".")


def forbid(*_: Any) -> None:
    pytest.fail("the file is read again")


def test_the_same_content_is_read_once_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(open_rows_of(write_rows(tmp_path / "a.json")))
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    monkeypatch.setattr(records, "read_texts", forbid)
    assert [row.turns for row in open_rows_of(tmp_path / "b.json")] == [row.turns for row in rows]
    assert next(iter(open_rows_of(tmp_path / "b.json"))).origin == f"{tmp_path}/b.json row 0"
    os.utime(tmp_path / "a.json", (1, 1))
    open_rows_of(tmp_path / "a.json")
    monkeypatch.setattr("hashlib.file_digest", forbid)  # neither its rows nor its bytes
    assert list(open_rows_of(tmp_path / "a.json")) == rows


def open_rows_of(path: Path) -> RowTable:
    return load_all_rows(DataSource(str(path), str(IMAGES)), pytest.fail)


@pytest.mark.parametrize("modified", [None, 1.0])
def test_other_content_behind_the_same_name_is_read(modified: float | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for index, answer in enumerate("abc"):  # of the same size
        write_rows(path, [conversation(None, "q", answer)])
        if modified is not None:
            os.utime(path, (modified + index, modified + index))
        (row,) = open_rows_of(path)
        assert row.turns[0].answer == answer


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = write_rows(tmp_path / "a.json"), records.read_texts

    def change(name: str) -> Any:
        yield from read(name)
        write_rows(path, [conversation(None, "q", "a")])

    monkeypatch.setattr(records, "read_texts", change)
    with pytest.raises(RowError, match=r"a\.json: changed while it was read"):
        open_rows_of(path)
    monkeypatch.undo()
    assert len(open_rows_of(path)) == 1


def open_in_a_process(path: Path, ready: Any, results: Any) -> None:
    builds, write = [], records._write_json
    records._write_json = lambda *arguments: (builds.append(1), write(*arguments))[1]
    hashed, digest = [], hashlib.file_digest

    def digest_slowly(file: Any, name: str) -> Any:
        hashed.append(1)
        time.sleep(0.1)  # the other processes look for the hash meanwhile
        return digest(file, name)

    hashlib.file_digest = digest_slowly
    ready.wait()
    rows = len(open_rows_of(path))
    results.put((rows, len(builds), len(hashed)))


def test_of_processes_that_open_a_file_at_once_one_reads_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", [conversation(None, f"q{index}", "a") for index in range(500)])
    os.utime(path, (1, 1))  # the hash of a file that was just written is not kept
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=open_in_a_process, args=(path, ready, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [rows for rows, _, _ in found] == [500] * 4
    assert sum(builds for _, builds, _ in found) == 1
    assert sum(hashed for _, _, hashed in found) == 1


def test_a_killed_build_leaves_nothing_that_is_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = write_rows(tmp_path / "a.json"), records._write_json

    def build_and_die(name: str, target: Path) -> None:
        write(name, target)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(records, "_write_json", build_and_die)
    process = multiprocessing.get_context("fork").Process(target=open_rows_of, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(cache.glob(".*/rows.arrow"))) == 1
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache.parent)
    assert len(open_rows_of(path)) == 8
    assert not list(cache.glob(".*/rows.arrow"))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (None, 1), (errno.EROFS, 2)])
def test_a_cache_that_cannot_be_written_is_one_line(
    number: int | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number)) if number else OSError("8 requested and 0 written")  # of NumPy

    def attempt() -> None:
        open_rows_of(path)

    monkeypatch.setattr(records, "_write_json", fail)
    path = write_rows(tmp_path / "a.json")
    with pytest.raises(SystemExit) as left:
        command_line.run(attempt)
    assert left.value.code == code
    line = capsys.readouterr().err
    assert line.startswith(f"error: HF_DATASETS_CACHE={tmp_path}/cache: ")
    assert line.count("\n") == 1


def encoder_of(loaded: LoadedModel, max_length: int = 2048) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, max_length, YI_VL)


def test_lengths_are_those_of_each_row_and_computed_once(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "BLOCK", 3)
    write_rows(tmp_path / "a.json")
    write_rows(tmp_path / "b.json", [3, *(conversation(None, "q " * count, "a") for count in range(20))])
    source = DataSource((str(tmp_path / "a.json"), str(tmp_path / "b.json")), max_rows=13)
    for max_length in (2048, 40):
        encoder = encoder_of(loaded, max_length)
        table = load_rows(source, 0, lambda _: None)
        expected = [encoder.sequence_length(row) for row in table]
        assert table.lengths(encoder).tolist() == expected
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "sequence_length", forbid)
            assert load_rows(source, 0, lambda _: None).lengths(encoder).tolist() == expected


def test_a_table_is_mapped_again_in_another_process_and_not_copied(tmp_path: Path) -> None:
    rows = [3, *(conversation("photo_rgb.jpg", f"question {index}", "a" * 50) for index in range(2000))]
    table = load_all_rows(DataSource(str(write_rows(tmp_path / "a.json", rows)), str(IMAGES)), lambda _: None)
    assert table[0].turns[0].question == "question 0"
    assert table.has_images.all()
    pickled = pickle.dumps(table)
    assert len(pickled) < 5000
    assert list(pickle.loads(pickled)) == list(table)


def test_images_outside_of_their_folder_need_a_flag(tmp_path: Path) -> None:
    (tmp_path / "images/within").mkdir(parents=True)
    shutil.copy(IMAGES / "photo_rgb.jpg", tmp_path)
    (tmp_path / "images/link.jpg").symlink_to(tmp_path / "photo_rgb.jpg")
    names = ["link.jpg", "../photo_rgb.jpg", str(tmp_path / "images/within/a.jpg"), "/dev/zero", "within/../b..jpg"]
    path = write_rows(tmp_path / "rows.json", [conversation(name, "q", "a") for name in names])

    def load(folder: Path | str, *, allow: bool = False) -> tuple[list[str], list[str]]:
        errors: list[RowError] = []
        (source,) = read_sources(str(path), str(folder), allow_outside_images=allow)
        rows = load_all_rows(source, errors.append)
        assert not allow or rows.notices()[0].startswith("2 rows have an image outside the image folder: ")
        return [row.origin[-1] for row in rows], [str(error) for error in errors]

    places, errors = load(tmp_path / "images")
    assert places == ["0", "2", "4"]
    assert errors[0].startswith(
        f"{path} row 1: the image {tmp_path}/images/../photo_rgb.jpg is outside the image folder "
    )
    assert errors[1].startswith(f"{path} row 3: the image /dev/zero is outside")
    assert errors[1].endswith("or allow it by --allow_outside_images")
    assert load(tmp_path / "images", allow=True) == (list("01234"), [])
    assert load("/")[0] == list("01234")
    places, errors = load(tmp_path)  # the folder has moved: another one is checked again
    assert (places, len(errors)) == (["0", "2", "4"], 2)


def test_a_mixture_cannot_allow_images_outside_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("- {data_path: a.json, allow_outside_images: true}\n")
    with pytest.raises(RowError, match="entry 0: unknown key 'allow_outside_images'"):
        read_sources(str(tmp_path / "mix.yaml"))


RANK = """
import sys
import time
import torch.distributed as dist
from yivl.data import records
from yivl.data.sources import DataSource, load_all_rows

builds, write = [], records._write_json
records._write_json = lambda *arguments: (builds.append(1), write(*arguments))
dist.init_process_group("gloo")
dist.barrier()
table = load_all_rows(DataSource(sys.argv[1]), print)
found = [None] * dist.get_world_size()
questions = [table[index].turns[0].question for index in (0, 9999)]
dist.all_gather_object(found, (len(builds), len(table), table.fingerprint, questions))
if not dist.get_rank():
    print(found)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_four_ranks_read_one_cache(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", [conversation(None, f"q{index}", "a") for index in range(10_000)])
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "of-ranks"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = ast.literal_eval(result.stdout.strip().splitlines()[-1])
    assert sum(builds for builds, *_ in found) == 1
    assert [rest for _, *rest in found] == [[10_000, found[0][2], ["q0", "q9999"]]] * 4
