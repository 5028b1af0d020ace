"""What a request or a server may ask: validation, defaults, and the resolution to integers before any hash.

Nothing here knows HTTP or vLLM. Errors are `FieldError`, which names the field and says what is allowed;
the caller turns it into the error of its own surface.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from fsr_vllm.adaptive import parse_range
from fsr_vllm.budgets import (
    MAX_BUDGET,
    MAX_IMAGES,
    Budget,
    FieldError,
    ImagePlan,
    field_error,
    parse_budget,
    parse_budget_text,
    parse_budgets,
    per_image,
    readable,
    resolve_budget,
    shown,
)

__all__ = [
    "HOW_TO_ACTIVATE", "MAX_BUDGET", "MAX_QUESTION", "PREFIX", "REQUEST_FIELDS", "SELECTION_VERSION",
    "SERVED_DEFAULTS", "SETTINGS_KEY", "Budget", "FieldError", "ImagePlan", "RequestFields", "ServerSettings",
    "build_method", "parse_budget", "parse_budget_text", "parse_budgets", "parse_range", "per_image", "readable",
    "resolve", "resolve_budget", "shown",
]  # fmt: skip

PREFIX = "fsr_"
# Characters of a question that are read: a text tower runs once per 75 tokens, inside the engine's step.
MAX_QUESTION = 4096
CACHE_BYTES = 256 << 20  # about 200 images of a CLIP-L/336 tower in half precision, or 400 preprocessed ones
SETTINGS_KEY = "fsr_settings"  # of the model config: how settings reach processors and workers
HOW_TO_ACTIVATE = 'start the server with --plugin fsr (offline: additional_config={"fsr": {}}, or VLLM_PLUGINS=fsr)'
REQUEST_FIELDS = ("fsr_budget", "fsr_method", "fsr_question", "fsr_options")

# Part of every pruned image's cache identity. Raise it whenever the same plan may keep other tokens than before,
# so that KV blocks in external or persistent caches of older versions are not taken for current ones.
SELECTION_VERSION = 1

# Laid under a request's `fsr_options`; {"preset": "paper"} drops it. Decided by measurement only: a method that is
# not listed is served with its published defaults. FSR's: benchmarks/results/accuracy.md (docs/testbed.md says how).
SERVED_DEFAULTS: dict[str, dict[str, Any]] = {
    "fsr": {"alpha": 3.0, "max_focus_share": 0.06, "scan": "relevance", "scan_gamma": 2.0}
}


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
        return _known_method(value, "fsr.method")

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


class RequestFields(BaseModel):
    """The fsr_* fields of one request, validated but not yet resolved to an image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    fsr_budget: Any = None
    fsr_method: str | None = None
    fsr_question: str | list[str] | None = None
    fsr_options: dict[str, Any] | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], settings: ServerSettings) -> RequestFields:
        """Validate fields against the registry and the server's bounds; null means absent; FieldError otherwise."""
        unknown = sorted(set(values) - set(REQUEST_FIELDS))
        if unknown:
            raise FieldError(unknown[0], f"unknown field {unknown[0]!r}; fsr fields are {', '.join(REQUEST_FIELDS)}")
        for name, kind, text in (
            ("fsr_method", str, "the name of a method"),
            ("fsr_options", dict, "an object of the method's options"),
        ):
            if values.get(name) is not None and not isinstance(values[name], kind):
                raise FieldError(name, f"{name} must be {text}; got {type(values[name]).__name__}")
        question = values.get("fsr_question")
        texts: list[Any] = question if isinstance(question, list) else [question]
        if len(texts) > MAX_IMAGES:
            raise FieldError("fsr_question", f"fsr_question may have {MAX_IMAGES} entries; got {len(texts)}")
        if question is not None and not all(isinstance(text, str) for text in texts):
            raise FieldError("fsr_question", "fsr_question must be text, or a list with one text per image")
        if question is not None and readable("".join(texts)) != "".join(texts):
            raise FieldError("fsr_question", "fsr_question must be valid Unicode; it holds half of a surrogate pair")
        longest = max((len(text) for text in texts if text), default=0)
        if longest > MAX_QUESTION:
            raise FieldError("fsr_question", f"fsr_question may have {MAX_QUESTION} characters; got {longest}")
        try:
            fields = cls(**values)
        except ValidationError as error:
            raise field_error(error, "") from None
        for budget in fields.budgets() or []:
            settings.check_bounds(budget)
        build_method(fields.fsr_method or settings.method, fields.fsr_options)
        return fields

    @field_validator("fsr_budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        return None if value is None else parse_budgets(value)

    @field_validator("fsr_method")
    @classmethod
    def _check_method(cls, value: str | None) -> str | None:
        return None if value is None else _known_method(value, "fsr_method")

    def budgets(self) -> list[Budget] | None:
        """All budgets asked for, as a list; None when the request has none."""
        if self.fsr_budget is None:
            return None
        return self.fsr_budget if isinstance(self.fsr_budget, list) else [self.fsr_budget]


def _known_method(name: str, field: str) -> str:
    from fsr_vllm.methods import methods

    if name not in methods():
        raise FieldError(field, f"{field} must be one of {', '.join(methods())}; got {name[:80]!r}")
    return name


def build_method(method: str, options: Mapping[str, Any] | None) -> Any:
    """The method with published defaults, then served defaults, then `options`; FieldError if wrong."""
    from fsr_vllm.methods import get_method

    given = dict(options or {})
    preset = given.pop("preset", None)
    if preset not in (None, "paper"):
        raise FieldError("fsr_options", f'fsr_options.preset must be "paper" or absent; got {shown(preset)}')
    served = {} if preset == "paper" else SERVED_DEFAULTS.get(method, {})
    try:
        return get_method(method, **{**served, **given})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FieldError("fsr_options", f"fsr_options: {str(error)[:500]}") from None


def resolve(
    fields: RequestFields, settings: ServerSettings, totals: Sequence[int], signals: Collection[str]
) -> list[ImagePlan]:
    """One plan per image, in prompt order; `signals` are the inputs this model can give a method."""
    count = len(totals)
    asked = settings.default_budget if fields.fsr_budget is None else fields.fsr_budget
    budgets = per_image(asked, count, "fsr_budget")
    questions = per_image(fields.fsr_question or "", count, "fsr_question")
    name = fields.fsr_method or settings.method
    method = build_method(name, fields.fsr_options)
    options = json.dumps(asdict(method), sort_keys=True, separators=(",", ":"))
    missing = [signal for signal in method.required() if signal not in signals]
    reads = {"relevance", "text"} & {*method.required(), *method.uses}  # where a question can come in
    asks = method.query_aware and not reads.isdisjoint(signals)
    plans = []
    for total, budget, question in zip(totals, budgets, questions, strict=True):
        keep = resolve_budget(budget, total)
        if isinstance(budget, float):
            settings.check_bounds(keep)
        if keep >= total:
            plans.append(ImagePlan(total, total))
            continue
        if missing:
            raise FieldError(
                "fsr_method", f"fsr_method {name!r} needs {', '.join(missing)}, which this server does not have"
            )
        plans.append(ImagePlan(total, keep, name, options, question.strip() if asks else ""))
    return plans
