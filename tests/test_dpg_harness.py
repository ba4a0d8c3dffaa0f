"""A task of the lm-evaluation-harness is read as the harness reads it."""

import json

import pytest

from dpg.prompts import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # The harness's own.

LAST_WORDS = """
task: last_words
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}}}}}
output_type: loglikelihood
training_split: train
test_split: train
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}} It is"
doc_to_choice: ["cold", "hot"]
doc_to_target: hot
metric_list: [{{metric: acc}}]
"""
DOCUMENTS = [{"text": "The sun is very hot", "hot": 1}, {"text": "Snow is cold", "hot": 0}]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))

    def written(name, content):
        (tmp_path / f"{name}.yaml").write_text(content.format(file=tmp_path / "documents.jsonl"))
        return str(tmp_path / f"{name}.yaml")

    return written


def test_questions_and_answers_are_whole_texts_again(task):
    assert read_prompts(task("last_words", LAST_WORDS)) == ["The sun is very hot", "Snow is cold"]


def test_of_several_choices_the_right_one_is_the_answer(task):
    assert read_prompts(task("choices", CHOICES)) == ["The sun is very hot It is hot", "Snow is cold It is cold"]


def test_what_is_no_task_says_why(task):
    with pytest.raises(ValueError, match="mine.yaml is not a task that can be loaded: it says no `task:`"):
        read_prompts(task("mine", "experiment: norm\n"))
