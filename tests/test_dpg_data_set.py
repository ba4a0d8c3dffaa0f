"""A run's data set is read by `datasets`, and TRL trains on it as it is."""

import json

import pytest
from dpg_problems import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def data_set(finished, tmp_path_factory):
    from datasets import load_dataset

    cache = str(tmp_path_factory.mktemp("cache"))
    return load_dataset("json", data_files=str(finished / "dataset.jsonl"), split="train", cache_dir=cache)


def test_datasets_reads_the_texts(finished, data_set):
    written = [json.loads(line)["text"] for line in (finished / "dataset.jsonl").read_text().splitlines()]
    assert data_set.column_names == ["text"] and list(data_set["text"]) == written


@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own.
def test_trl_trains_on_the_texts(finished, data_set, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(finished / "target")
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data_set,
        processing_class=AutoTokenizer.from_pretrained(finished / "target"),
    )
    outcome = trainer.train()
    assert outcome.global_step == 2 and outcome.training_loss > 0
    assert float((model.get_input_embeddings().weight.detach() - before).abs().max()) > 1e-5
