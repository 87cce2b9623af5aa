"""Run folders in which one file is broken, and the commands that read it.

`JSON` are ways in which a JSON file can be broken whatever it is for; the others belong to one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Content = bytes | str | Callable[[Path], None]


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path)


JSON: dict[str, Content] = {
    "empty": b"",
    "no JSON": "score: 3",
    "cut": '{"score_before": 1.0, "sco',
    "list": "[1, 2]",
    "text": '"a"',
    "number": "3",
    "null": "null",
    "deep": "[" * 100_000,
    "5000 digits": f'{{"prompts": {"9" * 5000}}}',
    "UTF-16": '{"prompts": 3}'.encode("utf-16"),
    "zeros": bytes(100),
    "pickle": b"cos\nsystem\n(S'x'\ntR.",
    "folder": a_folder,
    "loop": a_loop,
}

EVAL: dict[str, Any] = {
    "scores are text": {"score_before": "a", "score_after": "b"},
    "scores are lists": {"score_before": [1], "score_after": [2]},
    "one score is text": {"score_before": 1.0, "score_after": "2"},
    "interval is a number": {"score_before": 1, "score_after": 2, "score_gain_ci95": 3},
    "interval of one": {"score_before": 1, "score_after": 2, "score_gain_ci95": [3]},
    "interval of text": {"score_before": 1, "score_after": 2, "score_gain_ci95": ["a", "b"]},
    "prompts is text": {"prompts": "many"},
    "prompts is a fraction": {"prompts": 2.5},
    "prompts is true": {"prompts": True},
    "KL is text": {"kl_ref_seq": "far"},
    "KL is a list": {"kl_ref_seq": []},
    "samples is a number": {"samples": 3},
    "samples is an object": {"samples": {"prompt": "a"}},
    "samples are text": {"samples": ["a"]},
    "samples are numbers": {"samples": [1]},
    "score of a sample is text": {"samples": [{"prompt": "a", "before": "b", "after": "c", "score_before": "d"}]},
    "sample's text is a number": {"samples": [{"prompt": 1, "before": 2, "after": 3}]},
    "calibration is a number": {"rm_calibration": 3},
    "calibration of numbers": {"rm_calibration": [1, 2]},
    "calibration of one": {"rm_calibration": [[1]]},
    "calibration of text": {"rm_calibration": [["a", "b", "c"]]},
    "calibration of nothing": {"rm_calibration": [[0, 0, 0]]},
    "accuracy is text": {"rm_pair_accuracy": "good"},
    "Spearman is an object": {"rm_pair_accuracy": 0.5, "rm_spearman": {}},
    "scored by a number": {"scored_by": 3},
    "scored by numbers": {"scored_by": [1]},
    "scored by an object": {"scored_by": [{"a": 1}]},
    "taught by a list": {"taught_by": ["judge"], "score_before": 1, "score_after": 2},
}  # fmt: skip

METRICS: dict[str, Content] = {
    "no JSON": "loss: 3\n",
    "list": "[1]\n",
    "null": "null\n",
    "number": "3\n",
    "no stage": '{"step": 1}\n',
    "no step": '{"stage": "ppo"}\n',
    "stage is a number": '{"stage": 3, "step": 1}\n',
    "stage is a list": '{"stage": ["ppo"], "step": 1}\n',
    "step is text": '{"stage": "ppo", "step": "one"}\n',
    "step is a list": '{"stage": "ppo", "step": [1]}\n',
    "step is an object": '{"stage": "ppo", "step": {}}\n',
    "step is null": '{"stage": "ppo", "step": null}\n',
    "steps of two kinds": '{"stage": "ppo", "step": 1}\n{"stage": "ppo", "step": "2"}\n',
    "score is text": '{"stage": "ppo", "step": 1, "score/mean": "good"}\n',
    "score is an object": '{"stage": "ppo", "step": 1, "score/mean": {"a": 1}}\n',
    "score is a list": '{"stage": "ppo", "step": 1, "score/mean": [1, 2]}\n',
    "time is text": '{"stage": "ppo", "step": 1, "time/step_s": "long"}\n',
    "ratio is text": '{"stage": "ppo", "step": 1, "policy/ratio_max": "large"}\n',
    "leash is text": '{"stage": "ppo", "step": 1, "leash/beta": "tight"}\n',
    "held-out score is text": '{"stage": "ppo", "step": 1, "heldout/score": "a", "heldout/kl_ref_seq": "b"}\n',
    "stopped without a share": '{"stage": "ppo", "step": 1, "stopped": true, "ess/share": "little"}\n',
    "5000 digits": f'{{"stage": "ppo", "step": {"9" * 5000}}}\n',
    "deep": "[" * 100_000 + "\n",
    "score is endless": '{"stage": "ppo", "step": 1, "score/mean": 1' + "0" * 400 + "}\n",
    "UTF-16": '{"stage": "ppo", "step": 1}\n'.encode("utf-16"),
    "zeros": bytes(100) + b"\n",
    "broken UTF-8": b'{"stage": "\xff", "step": 1}\n',
    "two on a line": '{"stage": "ppo", "step": 1} {"stage": "ppo", "step": 2}\n',
    "folder": a_folder,
    "loop": a_loop,
}  # fmt: skip

AGREEMENT: dict[str, Any] = {
    "nothing in it": {},
    "accuracy is text": {"pair_accuracy": "good"},
    "accuracy is null": {"pair_accuracy": None},
    "accuracy is a list": {"pair_accuracy": [0.9]},
    "accuracy is true": {"pair_accuracy": True},
    "accuracy is no number": {"pair_accuracy": float("nan")},
}

ROUNDS: dict[str, Any] = {
    "nothing in it": {},
    "policies are numbers": {"policies": [1]},
    "no policies": {"policies": []},
    "policies without names": {"policies": [{"score": 1}]},
    "score is text": {"policies": [{"name": "SFT", "score": "a"}]},
    "samples are numbers": {"samples": [1]},
    "answers are missing": {"samples": [{"prompt": "a"}]},
    "one answer too many": {"samples": [{"prompt": "a", "answers": ["b", "c", "d"]}]},
    "evaluation is a number": {"evaluation": 3},
    "interval of one": {"policies": [{"name": "SFT", "score": 1, "score_gain_ci95": [1]}]},
    "right is a number": {"policies": [{"name": "SFT", "score": 1, "rm_right": 3}]},
    "own score of one": {"policies": [{"name": "SFT", "score": 1, "own_score": [3]}]},
}
SOUND_ROUNDS: dict[str, Any] = {
    "rounds": 1,
    "evaluation": {"prompts": 4},
    "scored_by": "people",
    "taught_by": "people",
    "policies": [{"name": "SFT", "score": 0.0}, {"name": "round 1", "score": 1.0}],
    "samples": [{"prompt": "a", "answers": ["b", "c"]}],
}

CANDIDATE = {"prompt": "a", "response": "b", "score": None}
CANDIDATES: dict[str, Content] = {
    "empty": "",
    "no JSON": "a\n",
    "list": "[1]\n",
    "null": "null\n",
    "no response": '{"prompt": "a"}\n',
    "no prompt": '{"response": "a"}\n',
    "score is text": json.dumps({**CANDIDATE, "score": "high"}) + "\n",
    "score is a list": json.dumps({**CANDIDATE, "score": [1]}) + "\n",
    "score is no number": json.dumps({**CANDIDATE, "score": float("nan")}) + "\n",
    "score is endless": '{"prompt": "a", "response": "b", "score": 1e999}\n',
    "prompt is a number": json.dumps({**CANDIDATE, "prompt": 3}) + "\n",
    "prompt of numbers": json.dumps({**CANDIDATE, "prompt": [1]}) + "\n",
    "no turns": json.dumps({**CANDIDATE, "prompt": []}) + "\n",
    "response is a number": json.dumps({**CANDIDATE, "response": 3}) + "\n",
    "name twice": '{"prompt": "a", "response": "b", "score": 1, "score": 2}\n',
    "UTF-16": (json.dumps(CANDIDATE) + "\n").encode("utf-16"),
    "broken UTF-8": b'{"prompt": "\xff", "response": "b", "score": null}\n',
    "zeros": bytes(100) + b"\n",
    "deep": "[" * 100_000 + "\n",
    "5000 digits": f'{{"prompt": "a", "response": "b", "score": {"9" * 5000}}}\n',
    "folder": a_folder,
    "loop": a_loop,
}  # fmt: skip

WEIGHTS: dict[str, Content] = {
    "empty": b"",
    "text": "weights",
    "zeros": bytes(1000),
    "header too long": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "header is no JSON": (10).to_bytes(8, "little") + b"0123456789",
    "header of nothing": (2).to_bytes(8, "little") + b"{}",
    "tensor beyond the end": (
        len(HEADER := b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}')
    ).to_bytes(8, "little")
    + HEADER,
    "pickle": b"\x80\x04cos\nsystem\n(S'x'\ntR.",
    "folder": a_folder,
    "loop": a_loop,
}

NO_ROLLOUT = {"step": [1], "prompt": ["a"], "score": [0.5], "tokens": [["b"]]}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "other columns": {"a": [1]},
    "steps are text": {**NO_ROLLOUT, "step": ["one"]},
    "no tokens": {k: v for k, v in NO_ROLLOUT.items() if k != "tokens"},
    "tokens are text": {**NO_ROLLOUT, "tokens": ["b"]},
    "tokens are numbers": {**NO_ROLLOUT, "tokens": [[1]]},
    "prompt is a number": {**NO_ROLLOUT, "prompt": [1]},
    "score is text": {**NO_ROLLOUT, "score": ["high"]},
    "advantages are text": {**NO_ROLLOUT, "advantages": [["a"]]},
    "ratio is a number": {**NO_ROLLOUT, "ratio": [1.0]},
}

CONTROL_EVAL: dict[str, Any] = {
    "nothing in it": {},
    "return is text": {"return_mean": "high"},
    "return is null": {"return_std": None},
    "steps is text": {"steps": "many"},
    "episodes is markup": {"episodes": "<script>alert(1)</script>"},
    "seed is markup": {"seed": "<script>alert(1)</script>"},
    "algorithm is a list": {"algorithm": ["<b>"]},
    "env is a number": {"env": 3},
}
SHEETS: dict[str, Any] = {
    "nothing in it": {},
    "size is text": {"obs_size": "four"},
    "size is negative": {"obs_size": -4},
    "size is huge": {"obs_size": 10**18},
    "actions is a number": {"actions": 3},
    "no actions": {"actions": {"kind": "discrete", "size": 0, "start": 0}},
    "unknown actions": {"actions": {"kind": "pictures", "size": 2, "start": 0}},
    "net is text": {"net": "wide"},
    "net of nothing": {"net": {"hidden": [0]}},
    "normalise is text": {"normalise_obs": "yes"},
}


def put(path: Path, content: Content | dict[str, Any]) -> None:
    """The content, in the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def linked(run: Path, place: Path, *parts: str) -> Path:
    """A copy of a run made of links; the folder of each of `parts` is real, so that a file in it can be replaced."""
    place.mkdir()
    for entry in run.iterdir():
        (place / entry.name).symlink_to(entry)
    for part in parts:
        folder = place / part
        if folder.is_symlink() and folder.is_dir():
            inside = folder.resolve()
            folder.unlink()
            linked(inside, folder)
    return place
