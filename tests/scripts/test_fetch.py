"""These tests fetch the demo's model and texts: what is checked, skipped and cleaned."""

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import fetch_demo
import pytest
import wikitext

ROOT = Path(__file__).resolve().parents[2]
TEXT = b"one text\n"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_part(*, member: str = digest(TEXT), result: str = digest(TEXT.upper())) -> fetch_demo.Part:
    """Returns a part that turns `pkg/data.txt` of the wheel `demo==1.0` into upper case."""

    def build(members: Path, target: Path) -> None:
        target.write_bytes((members / "pkg/data.txt").read_bytes().upper())

    return fetch_demo.Part(
        target="data/demo.txt",
        requirement="demo==1.0",
        members={"pkg/data.txt": member},
        results={"": result},
        licence="none",
        build=build,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Returns a cache in which the wheel of `a_part` is already downloaded."""
    wheel = tmp_path / "wheels" / "demo-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/data.txt", TEXT)
    return tmp_path


def fetch_part(monkeypatch: pytest.MonkeyPatch, cache: Path, part: fetch_demo.Part) -> None:
    monkeypatch.setattr(fetch_demo, "PARTS", {"demo": part})
    fetch_demo.fetch(["demo"], cache)


def left_in(cache: Path) -> set[str]:
    """Returns the names in the cache beside the wheels and `data`."""
    return (
        {path.name for path in cache.rglob("*")}
        - {"wheels", "data"}
        - {path.name for path in (cache / "wheels").iterdir()}
    )


def test_a_part_is_built_from_the_wheel(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_part(monkeypatch, cache, a_part())
    assert (cache / "data/demo.txt").read_bytes() == TEXT.upper()
    assert left_in(cache) == {"demo.txt"}
    assert "licence" in capsys.readouterr().out


def test_a_second_call_does_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fetch_part(monkeypatch, cache, a_part())
    before = (cache / "data/demo.txt").stat()
    (cache / "wheels/demo-1.0-py3-none-any.whl").unlink()

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a complete part must not be downloaded again")

    monkeypatch.setattr(subprocess, "run", no_network)
    fetch_part(monkeypatch, cache, a_part())
    after = (cache / "data/demo.txt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_result_is_built_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fetch_part(monkeypatch, cache, a_part())
    (cache / "data/demo.txt").write_bytes(b"half of it")
    fetch_part(monkeypatch, cache, a_part())
    assert (cache / "data/demo.txt").read_bytes() == TEXT.upper()


@pytest.mark.parametrize(
    ("part", "remedy"),
    [(a_part(member="0" * 64), "delete demo-1.0"), (a_part(result="0" * 64), "constraints.txt")],
    ids=["member", "result"],
)
def test_a_wrong_checksum_is_refused(
    monkeypatch: pytest.MonkeyPatch, cache: Path, part: fetch_demo.Part, remedy: str
) -> None:
    with pytest.raises(fetch_demo.FetchError, match=rf"expected 0{{64}}; .*{remedy}"):
        fetch_part(monkeypatch, cache, part)
    assert left_in(cache) == set()


def test_a_damaged_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (cache / "wheels/demo-1.0-py3-none-any.whl").write_bytes(b"not a zip file")
    with pytest.raises(fetch_demo.FetchError, match=r"demo-1\.0.* is damaged .*; delete"):
        fetch_part(monkeypatch, cache, a_part())
    assert left_in(cache) == set()


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retry\nERROR: no route")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch_demo.FetchError, match=r"demo==1\.0 \(ERROR: no route\); check the"):
        fetch_part(monkeypatch, tmp_path, a_part())
    assert left_in(tmp_path) == set()


def test_the_model_brings_the_text_it_is_checked_on() -> None:
    assert fetch_demo.with_needs(["smollm2"]) == ["wikipedia", "smollm2"]


def test_an_unknown_part_is_bad_usage() -> None:
    script = ROOT / "scripts/fetch_demo.py"
    run = subprocess.run(
        [sys.executable, script, "smolm2"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "'smolm2'; choose from wikipedia, news, smollm2, minilm" in run.stderr


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Bold''' and ''italic'' [[Cat|cats]] of [[Rome]].", "Bold and italic cats of Rome."),
        ("A{{cite|x}} b<ref>Smith {{p|3}}</ref> c<!-- no --> d.", "A b c d."),
        ("[[File:a.png|thumb|A [[cat]] sits.]]\nText.[[Category:Cats]]", "Text."),
        ("It is {{convert|5|km}} &ndash; far.", "It is 5 km \u2013 far."),
        ("Rome (; {{IPA|x}}, Latin) is old.", "Rome (Latin) is old."),
        ("Rome ({{IPA|x}}) is old.", "Rome is old."),
        ("Before.\n{|\n! head\n|-\n| cell\n|}\nAfter.", "Before.\nAfter."),
        ("One.\n\n== Life ==\n* Two.\n\n== See also ==\n* [[Three]]", "One.\nLife\nTwo."),
        ("A [http://x.org site] and <b>more</b>.", "A site and more."),
    ],
)
def test_prose_has_no_markup(markup: str, expected: str) -> None:
    assert wikitext.prose(markup) == expected


def test_only_articles_are_kept() -> None:
    article = "A sentence about cats. " * 100
    pages = [
        ("Cat", "0", article),
        ("Cats", "0", "<redirect/>"),
        ("Wikipedia:Cats", "4", article),
        ("Cat (disambiguation)", "0", article),
        ("Tom", "0", "{{disambig}} " + article),
        ("List of cats", "0", article),
        ("Kitten", "0", "A stub."),
        ("Dog", "0", "{{about|x|y (disambiguation)}}\n\nAbout dogs. " * 200),
    ]
    found = list(wikitext.articles(io.BytesIO(dump(pages))))
    assert found == [article.strip(), "\n".join(["About dogs."] * 200)]


def dump(pages: list[tuple[str, str, str]]) -> bytes:
    """Returns a MediaWiki export of (title, namespace, text); `<redirect/>` makes a redirect."""
    entries = []
    for title, namespace, text in pages:
        redirect = text if text.startswith("<redirect") else ""
        body = "" if redirect else text
        entries.append(
            f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}"
            f"<revision><text>{body}</text></revision></page>"
        )
    xmlns = "http://www.mediawiki.org/xml/export-0.10/"
    return f'<mediawiki xmlns="{xmlns}">{"".join(entries)}</mediawiki>'.encode()
