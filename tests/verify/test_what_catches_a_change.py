"""Changes whose manifest was rewritten: the files, the original or the pin catches each."""

from pathlib import Path

import damage
import pytest
from verify_helpers import Made, failed

from lrc_cli.verify import verify_directory

FILES, ORIGINAL, PIN = "files", "original", "pin"
"""What catches a change whose manifest was rewritten: the files alone, the original, or the pin."""
MUTATIONS: dict[str, tuple[damage.Mutation, str]] = {
    "lowest bit of a factor": (damage.flip_a_bit, PIN),
    "a number of a factor": (damage.flip_a_high_bit, ORIGINAL),
    "a number of a kept tensor": (damage.change_a_kept_tensor, ORIGINAL),
    "a swapped permutation": (damage.swap_the_permutation, ORIGINAL),
    "no permutation": (damage.repeat_in_the_permutation, FILES),
    "a renamed key": (damage.rename_a_key, FILES),
    "a dropped shard": (damage.drop_a_shard, FILES),
    "a dropped shard, index rewritten": (damage.drop_a_shard_and_its_entries, FILES),
    "a rank in config.json": (damage.change_a_rank, FILES),
    "a storage in config.json": (damage.rename_a_storage, FILES),
    "a storage in config.json and report.json": (damage.rename_a_storage_everywhere, FILES),
    "all storages in config.json and report.json": (damage.rename_all_storages_everywhere, FILES),
    "another key of config.json": (damage.change_the_heads, ORIGINAL),
    "a size": (damage.edit(damage.better_size), FILES),
    "a layer's errors": (damage.edit(damage.better_layer_error), ORIGINAL),
    "an error below its optimum": (damage.edit(damage.better_than_optimal), FILES),
    "a loss and its perplexity": (damage.edit(damage.better_quality), ORIGINAL),
    "a perplexity": (damage.edit(damage.better_perplexity), FILES),
    "a divergence": (damage.edit(damage.better_divergence), ORIGINAL),
    "a layer's held-out error": (damage.edit(damage.held_out_figure), ORIGINAL),
    "a certificate's bound": (damage.edit(damage.better_bound), FILES),
    "a certificate's value": (damage.edit(damage.better_values), FILES),
    "what the certificate's sentences call it": (damage.edit(damage.other_words), ORIGINAL),
    "a sentence of the certificate": (damage.edit(damage.better_sentence), FILES),
    "a sentence of README.md": (damage.edit_the_card, FILES),
    "a sentence of report.html": (damage.edit_the_page, FILES),
    "a key of lrc.yaml": (damage.edit_the_config, FILES),
    "a file more": (damage.add_a_file, FILES),
    "a side file": (damage.edit_the_licence, FILES),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_caught_by(made: Made, tmp_path: Path, name: str) -> None:
    mutate, level = MUTATIONS[name]
    output = damage.copied(made.output, tmp_path)
    mutate(output)
    plainly = failed(verify_directory(output))
    assert any(line.startswith(("files.", "tensors.hash")) for line in plainly)
    damage.rewrite_manifest(output)
    hidden = failed(verify_directory(output, manifest_sha256=made.pin))
    assert any(line.startswith("manifest.pinned") for line in hidden)
    assert (len(hidden) > 1) == (level == FILES), hidden
    if level != FILES:
        found = failed(verify_directory(output, against=made.original))
        assert bool(found) == (level == ORIGINAL), found


def test_the_documentation_has_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    words = {FILES: "`verify DIR`", ORIGINAL: "`--against`", PIN: "`--manifest-sha256`"}
    for name, (_, level) in MUTATIONS.items():
        assert f"| {name} | {words[level]} |" in text
