"""SFT or reward model by ppolite: updates on given batches, timed."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.workers.common import told
from benchmarks.workers.updates import Updates
from ppolite import SFT, RewardModel, load_recipe
from ppolite.stages.reward import Row
from ppolite.types import Prompt


def main() -> None:
    spec = told()
    recipe = load_recipe(spec["recipe"], [*spec["overrides"], f"model={spec['model']}"])
    updates = Updates(spec)
    stage: Any = {"sft": SFT, "reward": RewardModel}[spec["stage"]](recipe, tempfile.mkdtemp())
    updates.begin()
    for batch in updates.batches:
        if spec["stage"] == "sft":
            rows = [tuple(row) for row in batch]
        else:
            rows = [Row(Prompt(), tuple((p, r) for p, r in row), 0.0) for row in batch]
        updates.done(stage.update(rows, stage.gradients(rows))["loss/train"])
    updates.report("transformers", "peft")


if __name__ == "__main__":
    main()
