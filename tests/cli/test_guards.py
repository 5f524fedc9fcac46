"""The guards of tests/conftest.py catch what they are there for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"

CASES = {
    "leaks_a_descriptor": "import os\ndef test(): os.open('/etc/passwd', os.O_RDONLY)",
    "leaves_a_child": "import os, time\ndef test():\n    if os.fork() == 0: time.sleep(4); os._exit(0)",
    "leaves_a_zombie": "import os\ndef test():\n    if os.fork() == 0: os._exit(0)",
    "warns": "import logging\ndef test(): logging.getLogger('lockfs.x').warning('odd %d', 1)",
    "expects_in_vain": "def test(expect_log): expect_log('WARNING lockfs.x: odd')",
    "skips": "import pytest\ndef test(): pytest.skip('no reason')",
    "skips_a_module": "import pytest\npytest.skip('no reason', allow_module_level=True)",
}
FINE = {
    "closes": "import os\ndef test(): os.close(os.open('/etc/passwd', os.O_RDONLY))",
    "declares": "import logging\ndef test(expect_log):\n    expect_log('WARNING lockfs.x: odd')\n"
    "    logging.getLogger('lockfs.x').warning('odd %d', 1)",
    "looks": "import logging\ndef test(caplog): logging.getLogger('lockfs.x').warning('odd')",
    "skips_with_leave": "import pytest\ndef test(): pytest.skip('there is a reason')",
    "fails_as_expected": "import pytest\n@pytest.mark.xfail(reason='known')\ndef test(): raise ValueError",
    "waits": "import subprocess\ndef test(): subprocess.run(['true'])",
}


def run(directory: Path, cases: dict[str, str]) -> tuple[int, set[str]]:
    """Run pytest on one file for each case under the guards, as in CI: exit code, and which failed."""
    shutil.copy(CONFTEST, directory)
    (directory / "allowed_skips.txt").write_text("# comment\n*skips_with_leave* # because\n")
    for name, text in cases.items():
        (directory / f"test_{name}.py").write_text(text + "\n")
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "--basetemp", str(directory / "base")]
    output = directory / "output"
    with output.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=directory,
            env={**os.environ, "CI": "true"},
            stdout=file,
            stderr=file,
            check=False,
        )
    return done.returncode, set(
        re.findall(r"^(?:FAILED|ERROR) test_(\w+)\.py", output.read_text(), re.MULTILINE)
    )


def test_what_is_wrong_fails(tmp_path: Path) -> None:
    """Leaks, strays, unexpected and missing records, and skips without leave fail the run."""
    collected = {name: text for name, text in CASES.items() if name != "skips_a_module"}
    assert run(tmp_path, collected) == (1, set(collected))


def test_skipped_module_fails(tmp_path: Path) -> None:
    """A module that skips itself while it is collected fails the run."""
    code, failed = run(tmp_path, {"skips_a_module": CASES["skips_a_module"]})
    assert code
    assert failed == {"skips_a_module"}


def test_what_is_right_passes(tmp_path: Path) -> None:
    """Tests that clean up, declare their warnings and have leave to skip pass."""
    assert run(tmp_path, FINE) == (0, set())


def test_leftover_process_fails_the_run(tmp_path: Path) -> None:
    """A process that works in the run's temporary directory when the run is over fails it."""
    text = (
        "import subprocess\n"
        "def test(tmp_path):\n"
        "    script = f'setsid sh -c \"sleep 4; : {tmp_path}\" &'\n"
        "    subprocess.run(['sh', '-c', script])"
    )
    assert run(tmp_path, {"leaves_a_daemon": text}) == (1, {"leaves_a_daemon"})
