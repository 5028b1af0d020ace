"""Options of one server: validation, defaults, and the bounds that requests have to keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from fsr_vllm.methods.budget import MAX_BUDGET, resolve_budget, whole

from .budget import Budget, FieldError, parse_budget, parse_range
from .method import known_method, served_methods
from .validation import Fields

# About 200 images of a CLIP-L/336 tower in half precision, or 400 preprocessed ones.
CACHE_BYTES = 256 << 20
MOST_BYTES = 1 << 40
SETTINGS_KEY = "fsr_settings"  # of the model config: how settings reach processors and workers
HOW_TO_ACTIVATE = (
    'start the server with --plugin fsr (offline: additional_config={"fsr": {}}, '
    "or VLLM_PLUGINS=fsr)"
)
DETAILS = ("low", "high", "auto", "original")  # every `image_url.detail` of OpenAI's API
# What start-up finds, which is no option.
_FOUND = ("tokens_per_image", "one_size", "unsupported", "signals")


def _off(meaning: object) -> Callable[[object], object]:
    """A reader of `off`, which YAML reads as false, where that means something."""
    return lambda value: meaning if value is False or value == "off" else whole(value)


def _budget(value: object, info: ValidationInfo) -> Budget | None:
    off = "off" if value is False else value
    return None if value is None else parse_budget(off, f"fsr.{info.field_name}")


def _details(value: object) -> object:
    return {} if value is None else _off({})(value)


def _range(value: object) -> object:
    if value is None or value is False:
        return None
    parse_range(value, "fsr.adaptive")
    return value


def _method(value: str) -> str:
    known_method(value, "fsr.method")
    if value not in (served := served_methods()):
        raise FieldError(
            "fsr.method",
            f"fsr.method must be one of {', '.join(served)}; no server can give {value} its inputs",
        )
    return value


def _sign(value: object) -> object:
    # Pydantic would take true and 1.0 for 1.
    return {"auto": "auto", "1": 1, "+1": 1, "-1": -1}.get(str(value))


Kept = Annotated[Budget, BeforeValidator(_budget)]
Bound = Annotated[Annotated[int, Field(ge=1, le=MAX_BUDGET)] | None, BeforeValidator(_off(None))]
Bytes = Annotated[int, Field(ge=0, le=MOST_BYTES), BeforeValidator(_off(0))]
Detail = Annotated[str, StringConstraints(pattern=f"^({'|'.join(DETAILS)})$")]
# A name, or NAME@REVISION with something on both sides of the last @.
Encoder = Annotated[
    str,
    StringConstraints(strip_whitespace=True, pattern=r"(?s)^([^@]+|.*[^\s].*@[^@]*[^@\s][^@]*)$"),
    BeforeValidator(_off("none")),
]


class ServerSettings(Fields):
    """Options of one server, the same in all its processes.

    They are `--fsr-*`, or additional_config={"fsr": {...}}.
    """

    prefix: ClassVar[str] = "fsr."
    unknown: ClassVar[str] = "unknown fsr option {name}; known: {known}"
    must: ClassVar[Mapping[str, str]] = {
        "min_budget": f"be an integer from 1 to {MAX_BUDGET:,}",
        "max_budget": f"be an integer from 1 to {MAX_BUDGET:,}",
        "method": "be the name of a method",
        "text_encoder": "be auto, a path, a name or NAME@REVISION, llm, or none",
        "relevance_sign": "be auto, 1 or -1",
        "detail_budgets": f"map {', '.join(DETAILS[:-1])} or {DETAILS[-1]} to a budget, "
        'as in {"low": 64}',
        "feature_cache_bytes": f"be a number of bytes from 0 (off) to {MOST_BYTES:,}",
        "pixel_cache_bytes": f"be a number of bytes from 0 (off) to {MOST_BYTES:,}",
        "model_alias": "be true or false",
        "encoder_limit": "be unpruned or kept",
        "ignore": "be true or false",
    }

    # Descriptions are the help texts of `vllm serve`.
    budget: Annotated[Budget | None, BeforeValidator(_budget)] = Field(
        default=None,
        description="Visual tokens kept per image when a request does not say: a number of tokens, "
        'a share between 0 and 1, or "off" (default: the maximum where there is one, else off).',
    )
    adaptive: Annotated[str | None, BeforeValidator(_range)] = Field(
        default=None,
        description="Default budget that follows the load: HIGH visual tokens per image at rest, "
        "down to LOW when requests queue or KV fills.",
    )
    min_budget: Bound = Field(default=None, description="Smallest budget a request may ask for.")
    max_budget: Bound = Field(
        default=None,
        description="Largest budget a request may ask for. vLLM profiles memory with it, so more "
        'images fit; requests for more, "off" included, are refused.',
    )
    method: Annotated[str, AfterValidator(_method)] = Field(
        default="fsr",
        description="Method used when a request does not say. See `fsr-vllm methods`.",
    )
    text_encoder: Encoder = Field(
        default="auto",
        description="CLIP text tower for query relevance: auto, a path, a name or NAME@REVISION, "
        "llm, or none.",
    )
    relevance_sign: Annotated[Literal["auto", 1, -1], BeforeValidator(_sign)] = Field(
        default="auto", description="Sign of the tower's patch-text cosine: auto, 1 or -1."
    )
    detail_budgets: Annotated[dict[Detail, Kept], BeforeValidator(_details)] = Field(
        default={}, description="Budgets for image_url.detail, e.g. '{\"low\": 64}'."
    )
    feature_cache_bytes: Bytes = Field(
        default=CACHE_BYTES,
        description="Vision features kept in each worker, so that a known image is not encoded "
        "again for another question, budget or method; 0 = off.",
    )
    pixel_cache_bytes: Bytes = Field(
        default=CACHE_BYTES,
        description="Preprocessed images kept in each API server, by image alone; 0 = off.",
    )
    model_alias: bool = Field(
        default=False,
        description="Serve every model and adapter name with a budget behind it too, such as "
        "NAME@fsr128, NAME@fsr0.25 or NAME@fsroff.",
    )
    encoder_limit: Literal["unpruned", "kept"] = Field(
        default="unpruned",
        description="What a pruned image counts in vLLM's limit on encoder work per step: its "
        "unpruned tokens, so that many small budgets never keep others waiting longer than "
        "without pruning, or the kept ones, for throughput of one's own batches.",
    )
    ignore: bool = Field(
        default=False,
        description="Roll back: serve as vLLM alone does. All other --fsr-* options are unused, "
        "and requests' fsr fields, headers and @fsr suffixes are dropped unread.",
    )
    # What start-up finds:
    tokens_per_image: int | None = None  # the most visual tokens that an image can have
    one_size: bool = True  # whether every image has as many
    unsupported: str | None = None  # why this model's images cannot be pruned
    signals: tuple[str, ...] = ()  # what the model's family can give a method

    @classmethod
    @functools.lru_cache(maxsize=16)
    def from_json(cls, text: str) -> ServerSettings:
        """Settings as they travel in the model config; read for every request, so parsed once."""
        return cls.model_validate_json(text)

    @classmethod
    def options(cls) -> list[str]:
        """The names that a user may set."""
        return [name for name in cls.model_fields if name not in _FOUND]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ServerSettings:
        """Validated settings; FieldError names the option, and those that exist."""
        return cls.validated(values)

    @model_validator(mode="after")
    def _check_together(self) -> ServerSettings:
        low, high = self.min_budget, self.max_budget
        if low is not None and high is not None and low > high:
            raise FieldError(
                "fsr.min_budget", f"fsr.min_budget {low} must not exceed fsr.max_budget {high}"
            )
        for name, budget in (
            ("budget", self.budget),
            *(("detail_budgets", b) for b in self.detail_budgets.values()),
        ):
            if budget is not None:
                self.check_bounds(budget, f"fsr.{name}")
        if self.adaptive is not None:
            if self.budget is not None:
                raise FieldError(
                    "fsr.adaptive", "fsr.adaptive sets the default budget; leave fsr.budget out"
                )
            for bound in self.adaptive_range or ():
                self.check_bounds(bound, "fsr.adaptive")
        return self

    @property
    def adaptive_range(self) -> tuple[int, int] | None:
        """(low, high) between which the default budget follows the load; None where it is fixed."""
        return None if self.adaptive is None else parse_range(self.adaptive, "fsr.adaptive")

    @property
    def default_budget(self) -> Budget:
        """What a request without a budget gets, without load."""
        if self.adaptive_range is not None:
            return self.adaptive_range[1]
        if self.budget is not None:
            return self.budget
        return self.max_budget if self.max_budget is not None else "off"

    @property
    def prunes_by_default(self) -> bool:
        """Whether some request without fsr fields is pruned."""
        return self.default_budget != "off" or any(b != "off" for b in self.detail_budgets.values())

    @property
    def every_total(self) -> int | None:
        """The visual tokens of every image; None where that depends on the image."""
        return self.tokens_per_image if self.one_size else None

    def check_bounds(
        self, budget: Budget, field: str = "fsr_budget", total: int | None = None
    ) -> None:
        """Refuse a budget outside the server's range.

        A share is judged once `total`, an image's tokens, is known; so is "off", of which the most
        that an image can have is judged before.
        """
        low, high = self.min_budget or 1, self.max_budget or MAX_BUDGET
        written = f'{field} "off"' if budget == "off" else f"{field} {budget}"
        if budget == "off" and total is None:
            total = self.tokens_per_image
            if total is None and self.max_budget is not None:
                raise FieldError(
                    field,
                    f"{written} = all visual tokens of an image, {self._limit(field, 'maximum')}",
                )
        if isinstance(budget, int):
            kept = budget
        elif total is None:
            return
        else:
            kept = resolve_budget(budget, total)
            written = f"{written} of {total} = {kept}"
        if kept > high:
            raise FieldError(field, f"{written}, {self._limit(field, 'maximum')}")
        if kept < low and budget != "off":
            raise FieldError(field, f"{written}, {self._limit(field, 'minimum')}")

    def check_part(self, kept: int, total: int, written: str, field: str) -> None:
        """Refuse what an image of `total` tokens gets of a budget over several, outside the range.

        An image that keeps all its tokens is never below it.
        """
        low, high = self.min_budget or 1, self.max_budget or MAX_BUDGET
        if kept > high or kept < min(low, total):
            which = "maximum" if kept > high else "minimum"
            raise FieldError(
                field,
                f"{written} gives an image of {total} tokens {kept}, {self._limit(field, which)}",
            )

    def _limit(self, field: str, which: str) -> str:
        """What a budget exceeds: a request's the server's bound, an option's another option."""
        low, high = self.min_budget or 1, self.max_budget or MAX_BUDGET
        side, bound = ("above", high) if which == "maximum" else ("below", low)
        if field.startswith("fsr."):
            return f"{side} fsr.{which[:3]}_budget {bound}"
        allowed = f"{low} to {high}" if self.max_budget is not None else f"{low} or more"
        return f"{side} this server's {which} {bound} (allowed: {allowed})"
