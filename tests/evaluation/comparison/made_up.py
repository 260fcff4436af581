"""A folder of a comparison as `manyicl compare` leaves it, with made-up answers: no model is loaded or trained."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from manyicl.evaluation.comparison.records import CellRecord, Forgetting, PositionScore
from manyicl.evaluation.result import RESULTS_ENDING, Result, readable_name
from tests.evaluation.test_result import make_result

# How able each regime is, without and with all examples, in logits.
ABILITIES: dict[str, tuple[float, float]] = {
    "base": (-1.5, -0.5),
    "zero_shot": (0.2, 0.0),
    "few_shot": (-0.8, 0.5),
    "last_answer": (-1.0, 0.7),
    "all_answers": (-0.6, 1.2),
    "dedicated": (1.4, 1.4),
}
REGIMES = tuple(ABILITIES)
# Further cells beside the regimes, trained like all answers: name -> fields of their record.
OTHERS: dict[str, dict[str, object]] = {
    "all_answers_equal_answers": {"equal": "answers"},
    "all_answers_replay": {"replay": True},
    "variant_shots_4": {"variant": "shots_4"},
}


@dataclass
class World:
    """What a made-up comparison holds.

    Attributes:
        tasks: Task -> role and family.
        regimes: Regimes with finished cells.
        others: Further cells; ablations have one training.
        num_seeds: Training seeds.
        training_spread: Standard deviation of how able a training is, in logits.
        abilities: Regime -> how able it is without and with all examples, in logits.
        failed: Cell -> why it failed.
        waiting: Cells that were not started.
        resampled: Tasks whose metric only a whole set has.
    """

    tasks: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {
            f"{role}_{family}_{i}": (role, family)
            for role in ("seen", "unseen")
            for family in ("classification", "qa")
            for i in range(2)
        }
    )
    regimes: Sequence[str] = REGIMES
    others: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: OTHERS)
    num_seeds: int = 3
    num_queries: int = 40
    shots: Sequence[int] = (0, 4, 16)
    few_shot: int = 4
    num_examples: Sequence[int] = (4, 16)
    training_spread: float = 0.1
    abilities: Mapping[str, tuple[float, float]] = field(default_factory=lambda: ABILITIES)
    failed: Mapping[str, str] = field(default_factory=dict)
    waiting: Sequence[str] = ()
    resampled: Sequence[str] = ()
    imported: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def cells(self) -> list[CellRecord]:
        """Records of all cells, those that are not finished as well."""
        kinds: dict[str, dict[str, object]] = {
            name: {"regime": name} for name in self.regimes if name not in ("base", "dedicated")
        }
        kinds |= {name: {"regime": "all_answers", **fields} for name, fields in self.others.items()}
        seeds = range(self.num_seeds) if "base" in self.regimes else range(0)
        cells = [self._cell(f"base_seed{seed}", seed, regime="base") for seed in seeds]
        for name, fields in kinds.items():
            seeds = range(1 if "variant" in fields else self.num_seeds)
            cells += [self._cell(f"{name}_seed{seed}", seed, **fields) for seed in seeds]
        if "dedicated" in self.regimes:
            for number, task in enumerate(self.tasks):
                for count in self.num_examples:
                    for seed in range(self.num_seeds):
                        name = f"dedicated_t{number}_{count}_seed{seed}"
                        cells.append(self._cell(name, seed, regime="dedicated", task=task, num_examples=count))
        return cells

    def _cell(self, name: str, seed: int, **fields: object) -> CellRecord:
        is_base = fields["regime"] == "base"
        loss = 3.0 + (0 if is_base else 0.1 if fields.get("replay") else 0.4 + 0.02 * seed)
        trained = {} if is_base else {"learning_rate": 1e-3, "num_steps": 100, "num_tokens": 200_000}
        moments = [(0, 3.0)] if is_base else [(0, 3.0), (50, (3.0 + loss) / 2), (100, loss)]
        shares = {(0, 0): 0.3, (1, 3): 0.5, (4, 15): 0.7}
        return CellRecord.model_validate(
            {
                "name": name,
                "equal": "tokens",
                "training_seed": seed,
                "num_answers": 0 if is_base else 4000,
                "seconds": 0 if is_base else 120.5,
                "peak_memory_gib": None if is_base else 1.25,
                "model_fingerprint": f"{zlib.crc32(('base' if is_base else name).encode()):08x}" * 8,
                "forgetting": [
                    Forgetting(
                        step=step,
                        nats_per_token=nats,
                        num_tokens=5000,
                        text_sha256="ab" * 32,
                        probes={"probe": 0.6 - (nats - 3) / 4},
                    )
                    for step, nats in moments
                    if fields["regime"] != "dedicated"
                ],
                "positions": [
                    PositionScore(
                        task=task, first=first, last=last, num_answers=20, accuracy=share, nats_per_answer=1 - share
                    )
                    for task, (role, _) in self.tasks.items()
                    for (first, last), share in shares.items()
                    if role == "unseen" and fields["regime"] in ("base", "last_answer", "all_answers")
                ],
                **trained,
                **fields,
            }
        )

    def results(self, cell: CellRecord) -> list[Result]:
        """Results of a cell at the shots that a comparison evaluates it at."""
        if cell.regime == "dedicated":
            assert cell.task is not None
            return [self._result(cell, cell.task, 0, cell.training_seed)]
        return [self._result(cell, task, shots, cell.training_seed) for task in self.tasks for shots in self.shots]

    def _result(self, cell: CellRecord, task: str, shots: int, draw: int) -> Result:
        none, all_of_them = self.abilities[cell.regime]
        training = self._rng(cell.name).normal(0, self.training_spread) * (cell.regime != "base")
        ability = none + (all_of_them - none) * np.log2(1 + shots) / np.log2(1 + max(self.shots)) + training
        if cell.regime == "dedicated":
            ability -= 1 / (cell.num_examples or 1)
        difficulty = self._rng(task).normal(0, 1, self.num_queries)
        # Without demonstrations the base answers alike, whatever the seed.
        answers_alike = cell.regime == "base" and shots == 0
        noise = self._rng(task, *(("base",) if answers_alike else (cell.name, shots, draw))).logistic(
            0, 0.5, self.num_queries
        )
        return self._record(cell.name, cell.model_fingerprint, task, shots, draw, ability - difficulty + noise > 0)

    def _record(
        self, name: str, fingerprint: str, task: str, shots: int, draw: int, is_right: NDArray[np.bool_]
    ) -> Result:
        role, family = self.tasks[task]
        right = np.asarray(is_right, dtype=float)
        fields: dict[str, object] = {"query_scores": tuple(right), "metric": "accuracy", "score": float(right.mean())}
        if task in self.resampled:
            chosen = np.random.default_rng(0).integers(len(right), size=(100, len(right)))
            resamples = right[chosen].mean(axis=1)
            fields |= {"query_scores": None, "resampled_scores": tuple(resamples), "metric": "macro_f1"}
        labels = {"num_labels": 2, "tfidf": 0.6 if shots else None} if family == "classification" else {}
        return make_result(
            key=f"{zlib.crc32(repr((name, task, shots, draw)).encode()):016x}",
            task=task,
            family=family,
            source=task,
            data_hash=f"data of {task}",
            queries_hash=f"queries of {task}",
            model=f"runs/{name}/model",
            model_name=name,
            model_fingerprint=fingerprint,
            num_shots=shots,
            num_shots_used=shots,
            seed=draw,
            num_queries=self.num_queries,
            standard_error=0.05,
            seen_in_training=role == "seen",
            majority=0.5,
            nearest=0.55 if shots else None,
            created=datetime(2026, 1, 1, tzinfo=UTC),
            **labels,
            **fields,
        )

    def imports(self) -> list[Result]:
        """Results of imported answers."""
        return [
            self._record(f"import_{name}", "", task, 0, 0, self._rng(name, task).random(self.num_queries) < share)
            for name, share in self.imported.items()
            for task in self.tasks
        ]

    def _rng(self, *names: object) -> np.random.Generator:
        return np.random.default_rng([self.seed, *(zlib.crc32(str(name).encode()) for name in names)])

    def settings(self) -> dict[str, object]:
        """The file of the comparison."""
        variants = {
            str(fields["variant"]): {"set": ["sequences.examples_per_episode=4"]}
            for fields in self.others.values()
            if "variant" in fields
        }
        dedicated = {"dedicated": {"num_examples": list(self.num_examples)}} if "dedicated" in self.regimes else {}
        return {
            "model": {"base": "builtin:nano"},
            "tasks": {"train": ["train"], "evaluate": ["validation"]},
            "training": {"num_tokens": 200_000, "learning_rate": 1e-3},
            "compare": {
                "regimes": list(self.regimes),
                "unseen": ["unseen"],
                "few_shot_demonstrations": self.few_shot,
                "num_training_seeds": self.num_seeds,
                "shots": list(self.shots),
                "num_queries": self.num_queries,
                **dedicated,
                **({"variants": variants} if variants else {}),
                "predictions": {name: f"{name}.jsonl" for name in self.imported},
            },
            "output": "runs/comparison",
        }

    def write(self, folder: Path) -> Path:
        """Write the folder; cells that failed or wait have no results."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.yaml").write_text(yaml.safe_dump(self.settings()), encoding="utf-8")
        roles = {t: {"role": role, "family": family, "source": t} for t, (role, family) in self.tasks.items()}
        (folder / "tasks.json").write_text(json.dumps(roles), encoding="utf-8")
        cells = self.cells()
        (folder / "cells.json").write_text(json.dumps([cell.name for cell in cells]), encoding="utf-8")
        results = self.imports()
        for cell in cells:
            place = folder / "runs" / cell.name
            if cell.name in self.waiting:
                continue
            place.mkdir(parents=True)
            (place / "cell.json").write_text("{}", encoding="utf-8")
            if cell.name in self.failed:
                failure = {"sentence": self.failed[cell.name]}
                (place / "failed.json").write_text(json.dumps(failure), encoding="utf-8")
                continue
            (place / "done.json").write_text(cell.model_dump_json(), encoding="utf-8")
            results += self.results(cell)
        (folder / "results").mkdir(exist_ok=True)
        for task in self.tasks:
            lines = [
                f'{{"record": {result.model_dump_json()}, "predictions": [], "context": []}}\n'
                for result in results
                if result.task == task
            ]
            if lines:
                path = folder / "results" / f"{readable_name(task)}{RESULTS_ENDING}"
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
        return folder
