"""Data sources: files, tar shards, and mixtures of them."""

from pathlib import Path

import pytest
from support.training import IMAGES, conversation, write_rows, write_shards

from yivl.data.bad_rows import BadRows
from yivl.data.rows import RowError
from yivl.data.sources import DataSource, expand_braces, load_rows, read_sources


def test_brace_patterns_expand_as_img2dataset_names_shards() -> None:
    assert expand_braces("a/{00008..00010}.tar") == ["a/00008.tar", "a/00009.tar", "a/00010.tar"]
    assert expand_braces("{0..1}/{8..9}.tar") == ["0/8.tar", "0/9.tar", "1/8.tar", "1/9.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


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
    assert (third.is_streamed, third.weight, third.max_rows) == (True, 2, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {data: a.json}", "entry 0: no data_path"),
        (
            "- {data_path: a.json, heft: 2}",
            "entry 0: unknown key 'heft'; expected one of data_path, image_folder, weight, max_rows",
        ),
        ("data_path: a.json", "expected a list of sources"),
        ("- [", "not readable YAML"),
        ("- {data_path: a.json, weight: 0}", "weight 0 is not positive"),
        ("- {data_path: a.json, max_rows: 0}", "max_rows 0 is not positive"),
        ("- {data_path: '*.tar', max_rows: 5}", "tar shards take no max_rows"),
        ("- {data_path: a.json, weight: heavy}", "entry 0: weight 'heavy' is not a number"),
    ],
)
def test_an_invalid_mixture_is_one_error_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(RowError, match=message):
        read_sources(str(tmp_path / "mix.yaml"))


def test_a_missing_mixture_and_an_unknown_file_type_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"mix\.yaml: not readable YAML"):
        read_sources(str(tmp_path / "mix.yaml"))
    with pytest.raises(RowError, match=r"rows\.csv: expected a \.json, \.jsonl, \.tar or \.yaml file"):
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
