"""One stage of a recipe from start to end, for its peak of memory. What came before it is taken from another run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.workers.common import report, told
from ppolite import load_recipe
from ppolite.stages.run import STAGES


def main() -> None:
    spec = told()
    recipe = load_recipe(spec["recipe"], spec["overrides"])
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sft", "reward"):
            if name != spec["stage"]:
                (Path(folder) / name).symlink_to(Path(spec["run"]).resolve() / name)
        STAGES[spec["stage"]](recipe, folder).run()
    report("transformers", "peft")


if __name__ == "__main__":
    main()
