"""Makes the small language models that the demonstrations use: ``python -m dpg.pretrain [languages] --out DIR``.

The generator is a Llama and the target a GPT-2 (with tied head, as published GPT-2s have), both trained on the prose of
`dpg.corpus`, or on that of `dpg.languages`, without the held-out part. They have the same tokenizer because one corpus
needs only one: texts pass from the generator to the target as strings.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpg import corpus, languages

END = "<|endoftext|>"
PACKAGES = ("torch", "transformers", "numpy", "pandas", "matplotlib", "sympy", "datasets", "accelerate")
POSITIONS = 128
ENGLISH_SHARE = 0.6


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose ids are ordered by how often their pieces occur in `texts`.

    Bytes are the alphabet, so no text has an unknown token. The order by frequency matters to the weight pictures: they
    are drawn on the rows of the first few ids, and a row learns only from texts that use its piece. `END`, the last id,
    opens, closes and pads a text.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)

    used = torch.tensor([i for encoding in raw.encode_batch(texts) for i in encoding.ids])
    counts = torch.bincount(used, minlength=raw.get_vocab_size())
    order = torch.argsort(counts, descending=True, stable=True).tolist()
    ids = {raw.id_to_token(old): new for new, old in enumerate(order)}
    merges = json.loads(raw.to_str())["model"]["merges"]  # Reachable only through the tokenizer's file format.
    raw.model = models.BPE(vocab=ids, merges=[tuple(merge) for merge in merges])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END, model_max_length=POSITIONS
    )


def make_generator(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained generator: two layers of width 128, embedding and head tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=POSITIONS,
            **_special(tokenizer),
        )
    )


def make_target(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained target: two layers of width 64 without dropout, so that its training is a function of the data."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, **_special(tokenizer)))


def train(
    model: PreTrainedModel, stream: Int[Tensor, " tokens"], epochs: float, peak: float = 3e-3, window: int = 64
) -> float:
    """Trains `model` in place on random windows of `stream`; returns the mean loss of the last tenth, nats per token.

    Args:
        stream: All texts one after another, each after an `END`.
        epochs: Passes over `stream`, counted in tokens.
        peak: The learning rate after warm-up, from which a cosine leads to zero.
    """
    batch, warmup = 32, 50
    steps = int(epochs * len(stream) / (batch * window))
    if steps < 10:
        raise ValueError(f"{len(stream)} tokens are too few: {epochs} passes over them make {steps} steps, not 10.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(stream) - window, (batch, 1))
        rows = stream[starts + torch.arange(window)]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        ramp.step()  # Multiplies what the cosine has set.
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return sum(losses[-(steps // 10) :]) / (steps // 10)


def pretrain(out: Path, seed: int, vocabulary: int, epochs: float) -> None:
    """Writes the folders ``generator`` and ``target`` under `out`, each with its model and the tokenizer.

    Equal arguments give equal models where the Python, the packages read, torch and the number of threads are equal.
    """
    torch.manual_seed(seed)
    texts = [passage for passage in corpus.passages(PACKAGES) if not corpus.is_held_out(passage)]
    tokenizer = train_tokenizer(texts, vocabulary)
    stream = make_stream(texts, tokenizer)
    print(f"{len(texts)} passages, {len(stream)} tokens")
    for name, make in (("generator", make_generator), ("target", make_target)):
        _train_and_write(make(tokenizer), tokenizer, stream, epochs, out / name)


def pretrain_languages(out: Path, seed: int, vocabulary: int, epochs: float, texts: Path | None = None) -> None:
    """As `pretrain`, on documents of two lines whose languages are drawn apart, six in ten of them English.

    So the generator knows five languages, and that any may follow an English line, but mostly English does.

    Args:
        texts: a folder of texts as `languages.passages` reads it; None for the manuals.
    """
    torch.manual_seed(seed)
    documents = languages.documents(languages.training(texts), ENGLISH_SHARE)
    tokenizer = train_tokenizer(documents, vocabulary)
    stream = make_stream(documents, tokenizer)
    print(f"{len(documents)} documents, {len(stream)} tokens")
    # The target reads less: a metric of its loss should have somewhere to go. A window holds most documents whole.
    for name, make, passes in (("generator", make_generator, epochs), ("target", make_target, 2 * epochs / 3)):
        _train_and_write(make(tokenizer), tokenizer, stream, passes, out / name, window=POSITIONS)


def multilingual_models() -> Path:
    """The folder of the multilingual generator and target, in the user's cache; made if they are not there.

    Raises:
        ValueError: if the texts cannot be fetched.

    Cost: the first time, five to ten minutes on one CPU thread.
    """
    folder = languages.cache() / "multilingual"
    if not folder.exists():
        print(f"making the multilingual models, once: {folder}", flush=True)
        with torch.random.fork_rng():
            partial = folder.with_name(f"multilingual-{os.getpid()}")
            pretrain_languages(partial, seed=0, vocabulary=2048, epochs=3.0)
            try:
                partial.replace(folder)
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(partial)  # Another process was faster.
    return folder


def make_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, " tokens"]:
    """All texts one after another in random order, each after an `END`."""
    shuffled = [texts[i] for i in torch.randperm(len(texts))]
    end = tokenizer.eos_token_id
    return torch.tensor([i for ids in tokenizer(shuffled, verbose=False)["input_ids"] for i in [end, *ids]])


def _train_and_write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stream: Int[Tensor, " tokens"],
    epochs: float,
    folder: Path,
    window: int = 64,
) -> None:
    print(f"{folder.name}: {model.num_parameters()} parameters")
    print(f"{folder.name}: final loss {train(model, stream, epochs, window=window):.3f} nats per token")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    end = tokenizer.eos_token_id
    return {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=["documentation", "languages"], default="documentation")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, help="number of tokens (1024; for languages 2048)")
    parser.add_argument(
        "--epochs", type=float, default=3.0, help="passes over the corpus (the languages' target makes two thirds)"
    )
    parser.add_argument(
        "--texts", type=Path, help="for languages: a folder with en.txt, de.txt, es.txt, fr.txt, it.txt"
    )
    arguments = parser.parse_args()
    try:
        if arguments.kind == "languages":
            pretrain_languages(
                arguments.out, arguments.seed, arguments.vocabulary or 2048, arguments.epochs, arguments.texts
            )
        else:
            pretrain(arguments.out, arguments.seed, arguments.vocabulary or 1024, arguments.epochs)
    except ValueError as error:
        parser.error(str(error))
