"""The model that trains on generated texts. Its training is a pure function: the model itself is never changed."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

import metagrad as mg
from dpg.metrics import Params, head
from dpg.text import Batch, encode, example_losses, rows

TEXTS_TOGETHER = 64
"""Texts in one forward pass, sorted by length: less padding, and tensors that a processor's cache holds."""


@dataclass(frozen=True)
class Target:
    """A causal language model, and how it is fine-tuned on a list of texts.

    Args:
        model: any Hugging Face causal language model. It is put in evaluation mode: no dropout.
        tokenizer: the model's own.
        optimizer: of the inner training.
        inner_batch_size: texts in one inner step; n texts make ceil(n / inner_batch_size) steps, each text used once.
        sequence_length: tokens kept of each text, and the denominator of its loss unless `loss_denominator` is given.
        train_eos: learn where texts end.
        loss_denominator: what each text's summed token loss is divided by.
        microbatch_size: texts differentiated at a time.
        clip_norm: clip the inner gradient's global norm.
        data_seed: fixes which text goes into which inner step, the same at every call.
        train_bos: learn how texts begin too: each stands behind a begin token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: mg.optim.GradientTransformation
    inner_batch_size: int = 1024
    sequence_length: int = 128
    train_eos: bool = True
    loss_denominator: float | None = None
    microbatch_size: int | None = None
    clip_norm: float | None = None
    data_seed: int = 42
    train_bos: bool = False

    def __post_init__(self) -> None:
        self.model.eval()
        positions = getattr(self.model.config, "max_position_embeddings", None)  # Not every architecture has a limit.
        if self.inner_batch_size < 1 or self.sequence_length < 2 or (positions and self.sequence_length > positions):
            raise ValueError(
                f"`inner_batch_size` {self.inner_batch_size} must be at least 1, and `sequence_length` "
                f"{self.sequence_length} from 2 to the model's {positions or 'any number of'} positions."
            )
        if self.loss_denominator is not None and not self.loss_denominator > 0:
            raise ValueError(f"`loss_denominator` is {self.loss_denominator}. Pass a number above 0.")
        _ = self.step  # Refuses its own arguments.

    @property
    def step(self) -> mg.TrainStep:
        """One inner training step with a weight for every text."""
        return mg.TrainStep(
            mg.weighted(self._losses), self.optimizer, microbatch_size=self.microbatch_size, clip_norm=self.clip_norm
        )

    def batches(self, texts: list[str], group_size: int = 1) -> list[Batch]:
        """The inner steps' batches; `index` is the position of each text in `texts`.

        Args:
            texts: in groups of `group_size` that stand together.
            group_size: groups stay together where they fit: they are shuffled, their texts are not.
        """
        encoded = encode(
            texts, self.tokenizer, self.sequence_length, train_eos=self.train_eos, train_bos=self.train_bos
        )
        data = {key: value.to(self.model.device) for key, value in encoded.items()}
        num_groups = math.ceil(len(texts) / group_size)
        groups = torch.randperm(num_groups, generator=torch.Generator().manual_seed(self.data_seed))
        order = (rearrange(groups, "groups -> groups 1") * group_size + torch.arange(group_size)).flatten()
        order = order[order < len(texts)]
        # Within an inner step by their lengths, as `TEXTS_TOGETHER` wants them.
        lengths = encoded["attention_mask"].sum(dim=1)
        steps = [chosen[lengths[chosen].argsort(stable=True)] for chosen in order.split(self.inner_batch_size)]
        return [rows(data, chosen.to(self.model.device)) for chosen in steps]

    def weights(self, texts: list[str]) -> dict[str, Tensor]:
        """The metaparameters of training on `texts`: a weight of 1 for each."""
        return {"weights": torch.ones(len(texts), dtype=self.model.dtype, device=self.model.device)}

    def fine_tune(self, texts: list[str], weights: Float[Tensor, " texts"] | None = None) -> Params:
        """The parameters after training on `texts`, from the initial ones; weights are 1 unless given."""
        meta = self.weights(texts) if weights is None else {"weights": weights}
        state = self.step.init(self.model, meta)
        with torch.no_grad():
            for batch in self.batches(texts):
                state = self.step(state, batch, meta)
        return state.params

    def _losses(self, params: Params, batch: Batch) -> Float[Tensor, " texts"]:
        denominator = self.sequence_length if self.loss_denominator is None else self.loss_denominator
        found = []
        for places in torch.arange(len(batch["index"]), device=self.model.device).split(TEXTS_TOGETHER):
            part = rows(batch, places)
            inputs = {key: part[key] for key in ("input_ids", "attention_mask")}
            logits = functional_call(self.model, params, (), {**inputs, "use_cache": False}).logits
            found.append(example_losses(logits, part["labels"], denominator))
        return torch.cat(found)


def load_model(source: str, *, untie: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer, from a local folder, a .gguf file or a hub name.

    Raises:
        ValueError: if there is no such model, saying what was looked for.
    """
    folder, options = source, {}
    if source.endswith(".gguf"):
        # Dequantised at once: a model that stays packed cannot be trained.
        folder, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    try:
        unpacked = {"quantization_config": GgufConfig(dequantize=True)} if options else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **unpacked)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ImportError as error:
        raise ValueError(f"{source} needs a package: {error}. Try pip install 'metagrad[scale]'.") from error
    except (OSError, ValueError, SafetensorError, struct.error) as error:  # The last two of damaged files.
        raise ValueError(
            f"{source!r} is neither a folder with a causal language model and its tokenizer (config.json, "
            "model.safetensors, tokenizer.json), nor a whole .gguf file, nor a model name that can be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    fuse_gelu(model)
    return (untie_head(model) if untie else model), tokenizer


def fuse_gelu(model: PreTrainedModel) -> None:
    """GPT-2's activation by one operation of torch instead of transformers' eight; changes the model it is given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def untie_head(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with an LM head of its own, equal to the embedding so far. Changes the model it is given."""
    if head(model) is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = torch.nn.Parameter(head(model).detach().clone())
        model.config.tie_word_embeddings = False
    return model
