"""Data sources: files, tar shards, and mixtures of them."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
from support.training import IMAGES, conversation, write_rows, write_shards

from yivl.data.bad_rows import BadRows
from yivl.data.patterns import expand_braces
from yivl.data.rows import RowError
from yivl.data.sources import DataSource, load_all_rows, load_rows, read_sources


def test_brace_patterns_expand_as_img2dataset_names_shards() -> None:
    assert expand_braces("a/{00008..00010}.tar") == ["a/00008.tar", "a/00009.tar", "a/00010.tar"]
    assert expand_braces("{0..1}/{8..9}.tar") == ["0/8.tar", "0/9.tar", "1/8.tar", "1/9.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(
    ("pattern", "number"),
    [("s{0..99999999}.tar", "100,000,000"), ("{0..9999}{0..9999}.tar", "100,000,000"), ("{5..3}.tar", "0")],
)
def test_a_pattern_of_too_many_paths_is_not_expanded(pattern: str, number: str) -> None:
    with pytest.raises(RowError, match=rf"names {number} paths; expected 1 to 1,000,000"):
        DataSource(pattern).shards()


def test_shards_are_found_by_braces_and_stars_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, num_shards=3, per_shard=1)
    assert [Path(path).name for path in DataSource(pattern).shards()] == ["00000.tar", "00001.tar", "00002.tar"]
    assert DataSource(str(tmp_path / "*.tar")).shards() == DataSource(pattern).shards()
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(RowError, match=r"00001\.tar: no such tar shard"):
        DataSource(pattern).shards()


def test_entries_of_a_mixture_override_the_defaults(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json")
    write_shards(tmp_path / "shards", num_shards=1)
    (tmp_path / "mix.yaml").write_text(
        "- {data_path: a.json, image_folder: images, weight: 0.5, max_rows: 3}\n"
        "- {data_path: a.json}\n"
        "- {data_path: 'shards/*.tar', weight: 2}\n"
    )
    first, second, third = read_sources(str(tmp_path / "mix.yaml"), "elsewhere", max_rows=50)
    assert first == DataSource(str(tmp_path / "a.json"), str(tmp_path / "images"), 0.5, 3)
    assert second == DataSource(str(tmp_path / "a.json"), "elsewhere", 1.0, 50)
    assert (third.is_streamed, third.weight, third.max_rows) == (True, 2, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {data: a.json}", "entry 0: no data_path"),
        (
            "- {data_path: a.json, heft: 2}",
            "entry 0: unknown key 'heft'; expected one of data_path, image_folder, weight, max_rows, name",
        ),
        ("data_path: a.json", "expected a list of sources"),
        ("- [", "not valid YAML .*; quote a path that begins with a brace"),
        ("- {data_path: a.json, weight: 0}", "weight 0 is not a positive finite number"),
        ("- {data_path: a.json, max_rows: 0}", "max_rows 0 is not positive"),
        ("- {data_path: a.json, max_rows: 5.0}", "entry 0: .*a.json: max_rows 5.0 is not an integer"),
        ("- {data_path: a.json, max_rows: 5e4}", "max_rows '5e4' is not an integer"),
        ("- {data_path: a.json, max_rows: true}", "max_rows True is not an integer"),
        ("- {data_path: a.json, 3: x, image: y}", "entry 0: unknown key '3'; expected one of data_path"),
        ("- {data_path: a.json, weight: .inf}", "weight inf is not a positive finite number"),
        ("[" * 1000, "nested more than 30 levels deep$"),
        ("- 2024-99-99", "not valid YAML .a value from line 1 on does not fit its tag"),
        ("- {data_path: a.json, weight: !!bool maybe}", "does not fit its tag"),
        ("- {data_path: a.json, weight: !!timestamp x}", "does not fit its tag"),
        ("- &a [1]\n" + "".join(f"- &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefgh")), "values$"),
        ("- {data_path: [a.tar, b.json]}", "both tar shards and files"),
        ("- {data_path: a.json, weight: heavy}", "entry 0: weight 'heavy' is not a number"),
    ],
)
def test_an_invalid_mixture_is_one_error_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(RowError, match=message):
        read_sources(str(tmp_path / "mix.yaml"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "mix.yaml"])
def test_a_pipe_is_refused_before_it_is_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(RowError, match=f"{name}: not a regular file"):
        load_rows(read_sources(str(tmp_path / name))[0], 0, print)


def test_a_missing_mixture_and_an_unknown_file_type_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"mix\.yaml: cannot be read \(No such file or directory\)"):
        read_sources(str(tmp_path / "mix.yaml"))
    with pytest.raises(RowError, match=r"rows\.csv: expected a \.json, \.jsonl, \.parquet, \.tar or \.yaml"):
        load_rows(DataSource("rows.csv"), 0, print)


def test_max_rows_is_a_random_subset_that_only_the_seed_determines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [conversation(None, f"q{i}", f"a{i}") for i in range(50)])
    source = DataSource(str(path), max_rows=10)
    chosen = [row.origin for row in load_rows(source, 1, print)]
    assert len(set(chosen)) == 10
    assert (
        chosen == [row.origin for row in load_rows(source, 1, print)] != [r.origin for r in load_rows(source, 2, print)]
    )


def test_invalid_rows_are_an_error_or_are_skipped_and_recorded_once(tmp_path: Path) -> None:
    good, bad = conversation(None, "q", "a"), conversation(None, "q", "a", role="wizard")
    path = write_rows(tmp_path / "rows.json", [good, bad, good])
    source = DataSource(str(path), str(IMAGES))
    with pytest.raises(RowError, match=r"rows\.json row 1: unknown role 'wizard'.* --on_bad_row skip"):
        load_rows(source, 0, BadRows("error", tmp_path / "bad.jsonl"))
    skip = BadRows("skip", tmp_path / "bad.jsonl")
    assert skip.report() == ""
    assert len(load_rows(source, 0, skip)) == len(load_rows(source, 0, skip)) == 2
    assert skip.report().startswith("1 invalid rows were skipped")
    assert "row 1: unknown role 'wizard'" in skip.report()


def rows_named(path: Path, prefix: str, count: int) -> Path:
    return write_rows(path, [conversation(None, f"{prefix}{index}", "a") for index in range(count)])


def test_entries_of_one_name_are_one_source_whose_limit_counts_all_files(tmp_path: Path) -> None:
    rows_named(tmp_path / "part_0.json", "a", 20)
    rows_named(tmp_path / "part_1.json", "b", 20)
    rows_named(tmp_path / "third.json", "c", 20)
    rows_named(tmp_path / "other.json", "d", 20)
    (tmp_path / "mix.yaml").write_text(
        "- {name: three, data_path: 'part_*.json', image_folder: x}\n"
        "- {data_path: [other.json]}\n"
        "- {name: three, data_path: third.json, image_folder: y}\n"
    )
    three, other = read_sources(str(tmp_path / "mix.yaml"), max_rows=30)
    assert (three.name, other.name) == ("three", str(tmp_path / "other.json"))
    assert [(Path(path).name, Path(folder).name) for path, folder in three.files()] == [
        ("part_0.json", "x"),
        ("part_1.json", "x"),
        ("third.json", "y"),
    ]
    chosen = [row.turns[0].question for row in load_rows(three, 0, print)]
    assert len(set(chosen)) == 30
    assert {question[0] for question in chosen} == {"a", "b", "c"}
    assert len(load_all_rows(three, print)) == 60
    assert len(load_rows(other, 0, print)) == 20


def test_the_same_file_twice_without_a_name_stays_two_sources(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("- {data_path: a.json, weight: 2}\n- {data_path: a.json, max_rows: 3}\n")
    assert [source.max_rows for source in read_sources(str(tmp_path / "mix.yaml"))] == [None, 3]


@pytest.mark.parametrize(
    "entries",
    ["- {data_path: [a.json, '*.json']}", "- {name: x, data_path: a.json}\n- {name: x, data_path: ./a.json}"],
)
def test_a_file_that_one_source_names_twice_is_an_error(entries: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json")
    (tmp_path / "mix.yaml").write_text(entries)
    (source,) = read_sources(str(tmp_path / "mix.yaml"))
    with pytest.raises(RowError, match=r"names .*a\.json twice; to train on it more often, give it a weight"):
        load_rows(source, 0, print)


@pytest.mark.parametrize("field", ["max_rows", "weight"])
def test_entries_of_one_name_that_contradict_each_other_are_an_error(field: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        f"- {{name: vg, data_path: a.json, {field}: 5}}\n- {{name: vg, data_path: b.json, {field}: 6}}\n"
    )
    with pytest.raises(RowError, match=rf"mix\.yaml entry 1: {field} of vg is 6, and 5 in an entry before"):
        read_sources(str(tmp_path / "mix.yaml"))


def test_the_limit_holds_under_every_weight() -> None:
    limited = [DataSource("a.json", weight=weight, max_rows=50) for weight in (0.5, 1, 3)]
    assert [source.samples_per_epoch(40) for source in limited] == [20, 40, 50]
    assert DataSource("a.json", weight=3).samples_per_epoch(40) == 120
