"""Files are tested: where one can be made, and what is said when a disk is full."""

from pathlib import Path

import pytest

from lrc_cli.errors import InputError
from lrc_cli.runtime.files import check_writable, copy_file, write_text


def test_where_something_can_be_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper", "output.path")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nothing")
    for place in ("file", "file/deeper", "link/deeper"):
        with pytest.raises(InputError, match=r"^some\.key: .* is not a writable .*; .*some\.key"):
            check_writable(tmp_path / place, "some.key")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_is_said_with_the_file_that_was_being_written(tmp_path: Path) -> None:
    source = tmp_path / "side.txt"
    source.write_text("x" * 10_000)
    full = Path("/dev/full")
    for write in (lambda: write_text(full, "x"), lambda: copy_file(source, full)):
        with pytest.raises(OSError, match="No space left") as found:
            write()
        assert found.value.filename == "/dev/full"
