"""Options of one server: validation, defaults, and the bounds that requests have to keep."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from .budget import MAX_BUDGET, Budget, FieldError, field_error, parse_budget, parse_range
from .method import known_method

CACHE_BYTES = 256 << 20  # about 200 images of a CLIP-L/336 tower in half precision, or 400 preprocessed ones
SETTINGS_KEY = "fsr_settings"  # of the model config: how settings reach processors and workers
HOW_TO_ACTIVATE = 'start the server with --plugin fsr (offline: additional_config={"fsr": {}}, or VLLM_PLUGINS=fsr)'


class ServerSettings(BaseModel):
    """Options of one server (`--fsr-*`, or additional_config={"fsr": {...}}), the same in all its processes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    budget: Any = None
    adaptive: Any = None
    min_budget: int | None = None
    max_budget: int | None = None
    method: str = "fsr"
    text_encoder: str = "auto"
    relevance_sign: Any = "auto"
    detail_budgets: dict[str, Any] = {}
    feature_cache_bytes: int = CACHE_BYTES  # of vision features, per worker
    pixel_cache_bytes: int = CACHE_BYTES  # of preprocessed images, per front-end process
    model_alias: bool = False
    encoder_limit: Literal["unpruned", "kept"] = "unpruned"  # what a pruned image counts of a step's encoder work

    @classmethod
    @functools.lru_cache(maxsize=16)
    def from_json(cls, text: str) -> ServerSettings:
        """Settings as they travel in the model config; read for every request, so parsed once."""
        return cls.model_validate_json(text)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ServerSettings:
        """Validated settings; FieldError names the option and, for an unknown one, those that exist."""
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            raise FieldError(
                f"fsr.{unknown[0]}", f"unknown fsr option {unknown[0]!r}; known: {', '.join(cls.model_fields)}"
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise field_error(error, "fsr.") from None

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        return None if value is None else parse_budget(value, "fsr.budget")

    @field_validator("adaptive", mode="before")
    @classmethod
    def _check_adaptive(cls, value: Any) -> Any:
        if value is not None:
            parse_range(value, "fsr.adaptive")
        return value

    @field_validator("min_budget", "max_budget", mode="before")
    @classmethod
    def _check_bound(cls, value: Any, info: Any) -> Any:
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_BUDGET):
            name = f"fsr.{info.field_name}"
            raise FieldError(name, f"{name} must be an integer from 1 to {MAX_BUDGET:,}; got {value!r}")
        return value

    @field_validator("feature_cache_bytes", "pixel_cache_bytes", mode="before")
    @classmethod
    def _check_bytes(cls, value: Any, info: Any) -> Any:
        if type(value) is not int or not 0 <= value <= 1 << 40:
            name = f"fsr.{info.field_name}"
            raise FieldError(name, f"{name} must be a number of bytes from 0 (off) to {1 << 40:,}; got {value!r}")
        return value

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str) -> str:
        return known_method(value, "fsr.method")

    @field_validator("relevance_sign", mode="before")
    @classmethod
    def _check_sign(cls, value: Any) -> Any:
        if isinstance(value, bool) or str(value) not in ("auto", "1", "-1", "+1"):
            raise FieldError("fsr.relevance_sign", f"fsr.relevance_sign must be auto, 1 or -1; got {value!r}")
        return "auto" if value == "auto" else int(value)

    @field_validator("detail_budgets", mode="before")
    @classmethod
    def _check_details(cls, value: Any) -> Any:
        name = "fsr.detail_budgets"
        if not isinstance(value, Mapping) or not set(value) <= {"low", "high", "auto"}:
            raise FieldError(name, f"{name} must map low, high or auto to a budget; got {value!r}")
        return {detail: parse_budget(budget, name) for detail, budget in value.items()}

    @model_validator(mode="after")
    def _check_together(self) -> ServerSettings:
        if self.min_budget is not None and self.max_budget is not None and self.min_budget > self.max_budget:
            raise FieldError("fsr.min_budget", "fsr.min_budget must not exceed fsr.max_budget")
        for name, budget in (("budget", self.budget), *(("detail_budgets", b) for b in self.detail_budgets.values())):
            if budget is not None and not isinstance(budget, float):
                self.check_bounds(budget, f"fsr.{name}")
        if self.adaptive is not None:
            if self.budget is not None:
                raise FieldError("fsr.adaptive", "fsr.adaptive sets the default budget; leave fsr.budget out")
            for bound in self.adaptive_range or ():
                self.check_bounds(bound, "fsr.adaptive")
        return self

    @property
    def adaptive_range(self) -> tuple[int, int] | None:
        """(low, high) between which the default budget follows the load; None where it is fixed."""
        return None if self.adaptive is None else parse_range(self.adaptive, "fsr.adaptive")

    @property
    def default_budget(self) -> Budget:
        """What a request without a budget gets, without load: the server's default, else its maximum, else all."""
        if self.adaptive_range is not None:
            return self.adaptive_range[1]
        if self.budget is not None:
            return self.budget
        return self.max_budget if self.max_budget is not None else "off"

    @property
    def prunes_by_default(self) -> bool:
        """Whether some request without fsr fields is pruned."""
        return self.default_budget != "off" or any(b != "off" for b in self.detail_budgets.values())

    def check_bounds(self, budget: Budget, field: str = "fsr_budget") -> None:
        """Refuse a budget outside the server's range; shares are checked once they are token counts."""
        low, high = self.min_budget or 1, self.max_budget
        if budget == "off":
            if high is not None:
                raise FieldError(
                    field, f'{field} "off" exceeds the server\'s maximum of {high} visual tokens per image'
                )
        elif not isinstance(budget, float) and not low <= budget <= (high or MAX_BUDGET):
            raise FieldError(
                field, f"{field} must be from {low} to {high or MAX_BUDGET:,} on this server; got {budget}"
            )
