"""SmolLM2-135M-Instruct: from a 4-bit GGUF file to a plain bfloat16 directory, and its check."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

SEQUENCES, LENGTH = 2, 512
LARGEST_PERPLEXITY = 40.0
ROUND_TRIP = "Naïve café: 12,345 things it's  worth\n\ttrying (日本)."


def convert(gguf: Path, licence: Path, target: Path) -> None:
    """Write model, tokenizer, chat template, generation config and licence to `target`.

    The weights are dequantised in float32 and rounded once, to bfloat16.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    dense_copy(loaded).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    tokenizer.save_pretrained(target)
    shutil.copyfile(licence, target / "LICENSE")


def dense_copy(loaded: PreTrainedModel) -> PreTrainedModel:
    """A bfloat16 model with the weights of `loaded` that does not count as quantised.

    transformers refuses to save what it loaded from GGUF, although the tensors are dense by then.
    """
    config = loaded.config.from_dict(loaded.config.to_dict())
    del config.quantization_config
    config.dtype = torch.bfloat16
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.load_state_dict(loaded.state_dict(), strict=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense.eval()


def problem(directory: Path, text: str) -> str | None:
    """The problem with a converted directory, in a few words; None if it passes every check."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if tokenizer.decode(tokenizer(ROUND_TRIP).input_ids) != ROUND_TRIP:
        return "its tokenizer does not give a text back"
    if not tokenizer.chat_template:
        return "its tokenizer has no chat template"
    if not model.config.tie_word_embeddings:
        return "its embeddings are not tied"
    perplexity = sequence_perplexity(model, tokenizer, text)
    if not perplexity < LARGEST_PERPLEXITY:
        return f"its perplexity on Wikipedia is {perplexity:.1f}, over {LARGEST_PERPLEXITY:.0f}"
    print(f"smollm2: perplexity {perplexity:.2f} on {SEQUENCES} x {LENGTH} tokens of Wikipedia")
    return None


@torch.inference_mode()
def sequence_perplexity(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> float:
    """exp of the mean next-token loss (nats) on the first `SEQUENCES` x `LENGTH` tokens."""
    tokens = tokenizer(text, truncation=True, max_length=SEQUENCES * LENGTH, return_tensors="pt")
    sequences = tokens.input_ids.view(SEQUENCES, LENGTH)
    return model(input_ids=sequences, labels=sequences).loss.exp().item()
