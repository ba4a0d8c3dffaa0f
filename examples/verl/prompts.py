"""Prompts for verl: a text file with one prompt a line becomes a parquet file of the rows that verl reads.

    python prompts.py prompts.txt data 256

writes data/test.parquet with the last 256 prompts and data/train.parquet with the others.
"""

import sys
from pathlib import Path

from datasets import Dataset


def rows(prompts: list[str], split: str) -> list[dict[str, object]]:
    """A row for each prompt; `index` tells which texts belong together, `split` which batch they are of."""
    return [
        {
            "data_source": "dpg",
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": index, "split": split},
        }
        for index, prompt in enumerate(prompts)
    ]


def write(source: Path, folder: Path, num_test: int) -> None:
    """Both files."""
    prompts = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not 0 < num_test < len(prompts):
        raise SystemExit(f"{source} has {len(prompts)} prompts; {num_test} of them cannot be for testing.")
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", prompts[:-num_test]), ("test", prompts[-num_test:])):
        Dataset.from_list(rows(part, split)).to_parquet(str(folder / f"{split}.parquet"))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
