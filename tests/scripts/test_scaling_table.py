"""The tables of docs/scaling.md, and bytes that are sent against the definition of the collectives."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.golden import ROOT


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return ROOT / "scripts"


@pytest.mark.usefixtures("scripts")
def test_a_rank_sends_what_ring_collectives_send() -> None:
    from measure_communication import bytes_per_step

    # 10 parameters, 6 of them trained; 4 ranks; weights of 2 bytes, gradients of 4: 3/4 of each buffer is sent.
    sent = {name: bytes_per_step(name, 10, 6, 4, 2, 4) for name in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")}
    assert sent == {"DDP": 36, "ZeRO-2": 27, "ZeRO-3": 48, "FSDP2": 48}


def test_the_tables_of_the_page_are_those_of_the_script() -> None:
    command = [sys.executable, "scripts/scaling_table.py"]
    tables = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert len(tables.split("\n\n")) >= 4
    for table in tables.strip().split("\n\n"):
        assert table in page


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_the_configuration_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```nginx\n(.*?)```", page, flags=re.DOTALL)
    settings = f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}} http {{ access_log off; {block} }}"
    (tmp_path / "nginx.conf").write_text(settings)
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
