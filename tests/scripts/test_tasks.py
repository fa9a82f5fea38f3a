"""These tests check the parts of scripts/bench_tasks.py: errors, texts, files."""

import struct
from pathlib import Path

import bench_tasks
import crnn
import espeak
import fetch_demo
import numpy as np
import parts
import pytest
import torch
import whisper_tiny
from tasks import common, encoder, lines, speech


@pytest.mark.parametrize(
    ("wanted", "given", "count"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("abc", "abc", 0)],
)
def test_edits_are_levenshteins(wanted: str, given: str, count: int) -> None:
    assert common.edits(wanted, given) == count
    assert common.edits(given, wanted) == count


def test_an_error_rate_is_over_all_that_was_wanted() -> None:
    rate = common.ErrorRate([speech.words("The cat, sat."), speech.words("It's a dog")])
    assert rate.of([speech.words("the cat sat"), speech.words("It's dog")]) == 1 / 6


def test_the_standard_error_is_of_the_difference_to_the_first_network() -> None:
    """Inputs differ in how hard they are, but the second network is worse by one on each input."""
    rate = common.ErrorRate(["abc", "def"])
    rate.of(["abc", "xyf"])
    rate.of(["axc", "xyz"])
    assert rate.standard_error() == 0
    rate.of(["axx", "xyf"])
    rises = torch.tensor([2.0, 0.0])
    assert rate.standard_error() == pytest.approx(rises.std().item() * 2**0.5 / 6)


def test_articles_are_split_without_a_shared_one() -> None:
    articles = [f"article {i}\nits text" for i in range(10)]
    first, last = common.split_articles("\n\n".join(articles) + "\n", 0.65)
    assert first + last == articles
    assert len(first) == 7


def test_sentences_end_before_a_capital() -> None:
    text = "It is 3.5 m long. See e.g. this one! Nobody knows."
    assert common.sentences(text)[0] == "It is 3.5 m long."
    assert common.sentences(text)[-1] == "Nobody knows."


def test_only_sentences_that_are_written_in_one_way_are_spoken() -> None:
    article = (
        "The long road goes on over the hill and far away. In 1990 nobody lived here.\n"
        "Then the king of France went to see the very old house again. Short one."
    )
    assert speech.spoken_sentences([article]) == [
        "The long road goes on over the hill and far away."
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, list("abcdefg")), (3, list("ace")), (1, ["a"]), (9, list("abcdefg"))],
)
def test_fewer_sentences_are_spread_evenly(count: int | None, expected: list[str]) -> None:
    assert speech.spread("abcdefg", count) == expected


def test_every_query_has_its_own_document() -> None:
    paragraphs = [f"First {i}. Second one. Third one." for i in range(1000)] + ["Too short."]
    queries, documents = encoder.pairs(paragraphs)
    assert len(queries) == len(documents) == encoder.PAIRS == len(set(queries))
    assert documents[0] == "Second one. Third one."


def test_retrieval_counts_the_nearest_document() -> None:
    queries = torch.eye(4)
    documents = torch.eye(4)[[0, 1, 3, 2]]
    assert encoder.retrieval(torch.cat([queries, documents])) == 0.5


def test_lines_are_of_whole_words_and_known_characters() -> None:
    text = "a quick brown fox näive jumps over the lazy dog and runs away from it all " * 20
    found = lines.cut_lines([text], 10)
    assert len(found) == 10
    assert all(set(line) <= set(crnn.CHARACTERS) for line in found)
    assert all(12 < len(line) <= 24 for line in found)
    images = lines.render(found, seed=0)
    assert images.shape == (10, 1, crnn.HEIGHT, lines.WIDTH)
    assert images.abs().max() <= 1
    assert torch.equal(images, lines.render(found, seed=0))


def test_ctc_drops_blanks_and_repetitions() -> None:
    numbers = [0, 1, 1, 0, 1, 2, 2, 0]
    logits = torch.nn.functional.one_hot(torch.tensor([numbers]), 97).float()
    first, second = crnn.CHARACTERS[:2]
    assert crnn.read_lines(logits) == [first + first + second]
    assert len(crnn.CHARACTERS) == len(set(crnn.CHARACTERS)) == 96


def test_the_recogniser_reads_a_place_for_every_four_pixels() -> None:
    with torch.no_grad():
        assert crnn.english().eval()(torch.zeros(2, 1, 64, 80)).shape == (2, 19, 97)


def test_a_lower_rate_keeps_what_is_heard() -> None:
    time = np.arange(22050) / 22050
    sound = np.sin(2 * np.pi * 440 * time) + np.sin(2 * np.pi * 10000 * time)
    found = espeak.resample(sound, 22050, 16000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(found) == 16000
    assert np.abs(found - wanted).max() < 1e-9


def test_stacked_matrices_of_ctranslate2_are_taken_apart(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        data = value.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    values = np.arange(12, dtype=np.float16).reshape(6, 2)
    tensor = text("decoder/layer_1/attention/linear_1/weight") + struct.pack("<BII", 2, 6, 2)
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    data += text("decoder/scale") + struct.pack("<BBIb", 0, 1, 1, 1)
    data += tensor + struct.pack("<BI", 4, values.nbytes) + values.tobytes()
    (tmp_path / "model.bin").write_bytes(data)
    found = dict(whisper_tiny.renamed(whisper_tiny.read(tmp_path / "model.bin")))
    place = "model.decoder.layers.1.encoder_attn"
    assert set(found) == {f"{place}.k_proj.weight", f"{place}.v_proj.weight"}
    assert torch.equal(found[f"{place}.v_proj.weight"], torch.tensor(values[3:]).float())


def test_groups_of_parts_are_parts() -> None:
    assert {*parts.DEMO, *parts.TESTS, *parts.TASKS} == set(parts.PARTS)
    assert "wikipedia" in fetch_demo.with_needs(["smollm2"])
    for part in parts.PARTS.values():
        digests = [*part.members.values(), *part.results.values()]
        assert all(len(digest) == 64 for digest in digests)
        assert part.licence


def test_rows_of_a_task_differ_in_what_they_are_named_for_only() -> None:
    methods = {row: {key.split("=")[0] for key in keys} for row, keys in common.ROWS.items()}
    assert methods[common.SVD] == methods[common.FROBENIUS] and not methods[common.OURS]


def test_every_task_is_found() -> None:
    for name in bench_tasks.TASKS:
        task = bench_tasks.find_task(name)
        assert 0 < task.size < 1 and task.title


def test_layers_and_rows_are_printed() -> None:
    size = {"kept_compressible": 0.5, "kept_checkpoint": 0.6}
    layers = [
        {
            "name": "a",
            "shape": [4, 6],
            "rank": 2,
            "storage": "factors",
            "errors": {"output": {"stored": 0.25}},
        },
        {"name": "b", "shape": [4, 6]},
    ]
    results = common.Results(
        scores={common.DENSE: {"error": 0.1}, common.OURS: {"error": 0.2}},
        reports={common.OURS: {"size": size, "layers": layers}},
    )
    assert "| ours | 0.5000 | 0.6000 | 0.2000 |" in bench_tasks.table(results)
    assert bench_tasks.layer_table(results).splitlines()[-2:] == [
        "| a | 4 x 6 | 2 | factors | 0.250 |",
        "| b | 4 x 6 |  | dense |  |",
    ]
