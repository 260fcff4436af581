"""Count what the packaged model was trained on, task by task: writes recipes/one_model/trained.csv.

    python benchmarks/one_model_tokens.py DATA      # DATA as in recipes/real/README.md; the base has to be fetched

Packed sequences are a function of seed and index, so the run's own are built again and counted.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

from manyicl.model.load import load_tokenizer
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import load_recipe_tasks
from manyicl.training.train import packed_sequences

FOLDER = Path(__file__).parents[1] / "recipes" / "one_model"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    text = FOLDER.with_suffix(".yaml").read_text(encoding="utf-8")
    recipe = Recipe.parse(text, overrides=[f"tasks.data_root={data}"])
    tasks = load_recipe_tasks(recipe).train
    tokens: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    episodes: Counter[str] = Counter()
    for sequence in packed_sequences(recipe, tasks, load_tokenizer("builtin:smollm2")):
        for episode in sequence.episodes:
            tokens[episode.task_name] += len(episode.token_ids)
            answers[episode.task_name] += len(episode.answer_spans)
            episodes[episode.task_name] += 1
    with (FOLDER / "trained.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["task", "source", "episodes", "answers", "tokens"])
        rows.writerows([t.name, t.source, episodes[t.name], answers[t.name], tokens[t.name]] for t in tasks)
    print(
        f"{tokens.total():,} tokens, {answers.total():,} answers, {episodes.total():,} episodes of {len(tasks)} tasks"
    )


if __name__ == "__main__":
    main()
