"""What a run's folder says of itself, checked before anybody computes with it or shows it.

A file that ppolite wrote is as it should be; one that was cut off, mended by hand or sent by somebody need not be.
`read_json` refuses it with its path, the key that is wrong, and what brings the file back. Keys that no form names
pass: a report of a later version may hold more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from ppolite.config.drafts import drafted
from ppolite.config.strict_json import loads
from ppolite.types import UserError

Figure = FiniteFloat | None
"""Null where there is nobody to ask."""
Interval = tuple[FiniteFloat, FiniteFloat] | None
Bin = tuple[FiniteFloat, FiniteFloat, Annotated[int, Field(ge=1)]]
"""Of a calibration: mean prediction, mean target, rows."""


class Form(BaseModel):
    """What a file must be. Strict: a number is a number, and no text that looks like one."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="after")
    def _figures(self) -> Form:
        """Figures have names that depend on who scored: `reward/NAME_before`, `judge_gain_ci95`."""
        for name, value in (self.model_extra or {}).items():
            if name.endswith("_ci95") and not (value is None or _is_interval(value)):
                raise ValueError(f"`{name}` is {value!r:.40}, not two numbers")
            if name.endswith(("_before", "_after")) and not (value is None or _is_number(value)):
                raise ValueError(f"`{name}` is {value!r:.40}, not a number")
        return self


class Sample(Form):
    """A prompt with the answers before and after PPO."""

    prompt: str
    before: str
    after: str


class Evaluation(Form):
    """`eval.json` of a language run."""

    prompts: int | None = None
    kl_ref_seq: Figure = None
    samples: list[Sample] | None = None
    scored_by: list[str] | None = None
    taught_by: str | None = None
    rm_spearman: Figure = None
    rm_pearson: Figure = None
    rm_pair_accuracy: Figure = None
    rm_calibration: list[Bin] | None = None
    rm_held_out: int | None = None


class Agreement(Form):
    """`reward/agreement.json`."""

    pair_accuracy: FiniteFloat
    spearman: Figure = None
    pearson: Figure = None
    calibration: list[Bin] | None = None
    held_out: int | None = None
    by_origin: dict[str, tuple[FiniteFloat, int]] = {}


class _Policy(Form):
    name: str
    score: FiniteFloat
    judge: Figure = None
    kl_ref_seq: Figure = None
    length: Figure = None
    distinct2: Figure = None
    candidates_score: Figure = None
    own_score: tuple[FiniteFloat, FiniteFloat] | None = None
    rm_right: tuple[FiniteFloat, int] | None = None


class _Answers(Form):
    prompt: str
    answers: list[str]


class _Prompts(Form):
    prompts: int


class Rounds(Form):
    """`rounds.json` of `ppolite iterate`."""

    policies: Annotated[list[_Policy], Field(min_length=1)]
    samples: list[_Answers]
    evaluation: _Prompts
    scored_by: str
    taught_by: str

    @model_validator(mode="after")
    def _all_answer(self) -> Rounds:
        for sample in self.samples:
            if len(sample.answers) != len(self.policies):
                raise ValueError(
                    f"a sample has {len(sample.answers)} answers of {len(self.policies)} policies"
                )
        return self


class ControlEvaluation(Form):
    """`eval.json` of a control run."""

    env: str
    algorithm: str
    seed: int
    steps: int
    episodes: int
    return_mean: FiniteFloat
    return_std: FiniteFloat
    return_min: FiniteFloat
    return_max: FiniteFloat
    length_mean: FiniteFloat


def read_json(path: Path, form: type[Form], remedy: str) -> dict[str, Any] | None:
    """The object in the file as plain data; None where there is no file.

    Raises UserError: `remedy` says what to do, such as "delete it and run `ppolite eval` again".
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    try:
        found = loads(text)
        if not isinstance(found, dict):
            raise ValueError("holds no object")
        form.model_validate_json(text.decode("utf-8-sig"), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {f'`{key}`: ' if key else ''}{what}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} {error}; {remedy}") from None
    return cast("dict[str, Any]", found)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: object) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, cast("list[Any]", value)))
    )
