"""What every section of a recipe is: frozen, without unknown keys, each field explained by the string below it."""

from __future__ import annotations

from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**63 - 1
"""Whole numbers beyond it fit into no array, and into no clock."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _say_what_they_mean(cls, given: Any) -> Any:
        """Python takes True for 1, and has whole numbers without end."""
        keys = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        for key, value in keys.items():
            kind = cls.model_fields[key].annotation if key in cls.model_fields else None
            if isinstance(value, bool) and kind and bool not in (kind, *get_args(kind)):
                raise ValueError(
                    f"`{key}` is {value}, which YAML makes of yes, no, on and off; give it in its own form"
                )
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"`{key}` is a number of more than 19 digits; give a smaller one")
        return cast("Any", given)

    @model_validator(mode="before")
    @classmethod
    def _leave_the_rest(cls, given: Any) -> Any:
        """Of a section whose defaults are this one's own, a recipe may give some keys: the others stay as they were.

        `ppo.optim` is `Optim(lr=3e-5)`; with its `schedule` set alone, its `lr` must not become that of `Optim()`.
        """
        if not isinstance(given, dict):
            return given
        keys = dict(cast("dict[str, Any]", given))
        for key, info in cls.model_fields.items():
            if isinstance(info.default, Section) and isinstance(keys.get(key), dict):
                keys[key] = info.default.model_dump(include=info.default.model_fields_set) | keys[key]
        return keys
