"""Options of one server: validation, defaults, and the bounds that requests have to keep."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .budget import (
    MAX_BUDGET,
    Budget,
    FieldError,
    field_error,
    parse_budget,
    parse_range,
    resolve_budget,
    whole,
)
from .method import known_method, served_methods
from .wording import cut, did_you_mean, shown

CACHE_BYTES = (
    256 << 20
)  # about 200 images of a CLIP-L/336 tower in half precision, or 400 preprocessed ones
SETTINGS_KEY = "fsr_settings"  # of the model config: how settings reach processors and workers
HOW_TO_ACTIVATE = 'start the server with --plugin fsr (offline: additional_config={"fsr": {}}, or VLLM_PLUGINS=fsr)'
DETAILS = ("low", "high", "auto", "original")  # every `image_url.detail` that OpenAI's API has
_FOUND = ("tokens_per_image", "unsupported", "signals")  # what start-up finds, which is no option


class ServerSettings(BaseModel):
    """Options of one server (`--fsr-*`, or additional_config={"fsr": {...}}), the same in all its
    processes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    # Descriptions are the help texts of `vllm serve`.
    budget: Any = Field(
        None,
        description="Visual tokens kept per image when a request does not say: a number of tokens, a share between 0 "
        'and 1, or "off" (default: the maximum where there is one, else off).',
    )
    adaptive: Any = Field(
        None,
        description="Default budget that follows the load: HIGH visual tokens per image at rest, down to LOW when "
        "requests queue or KV fills.",
    )
    min_budget: int | None = Field(None, description="Smallest budget a request may ask for.")
    max_budget: int | None = Field(
        None,
        description="Largest budget a request may ask for. vLLM profiles memory with it, so more images fit; requests "
        'for more, "off" included, are refused.',
    )
    method: str = Field(
        "fsr", description="Method used when a request does not say. See `fsr-vllm methods`."
    )
    text_encoder: str = Field(
        "auto",
        description="CLIP text tower for query relevance: auto, a path, a name or NAME@REVISION, llm, or none.",
    )
    relevance_sign: Any = Field(
        "auto", description="Sign of the tower's patch-text cosine: auto, 1 or -1."
    )
    detail_budgets: dict[str, Any] = Field(
        {}, description="Budgets for image_url.detail, e.g. '{\"low\": 64}'."
    )
    feature_cache_bytes: int = Field(
        CACHE_BYTES,
        description="Vision features kept in each worker, so that a known image is not encoded again for another "
        "question, budget or method; 0 = off.",
    )
    pixel_cache_bytes: int = Field(
        CACHE_BYTES,
        description="Preprocessed images kept in each API server, by image alone; 0 = off.",
    )
    model_alias: bool = Field(
        False,
        description="Serve every model and adapter name with a budget behind it too, such as NAME@fsr128, "
        "NAME@fsr0.25 or NAME@fsroff.",
    )
    encoder_limit: Literal["unpruned", "kept"] = Field(
        "unpruned",
        description="What a pruned image counts in vLLM's limit on encoder work per step: its unpruned tokens, so that "
        "many small budgets never keep others waiting longer than without pruning, or the kept ones, for throughput "
        "of one's own batches.",
    )
    ignore: bool = Field(
        False,
        description="Roll back: serve as vLLM alone does. All other --fsr-* options are unused, and requests' fsr "
        "fields, headers and @fsr suffixes are dropped unread.",
    )
    # What start-up finds:
    tokens_per_image: int | None = None  # the most visual tokens that an image can have
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
        """Validated settings; FieldError names the option and, for an unknown one, those that
        exist.
        """
        known = cls.options()
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            name = cut(unknown[0])
            near = did_you_mean(name, known)
            raise FieldError(
                f"fsr.{name}", f"unknown fsr option {name!r}; known: {', '.join(known)}{near}"
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise field_error(error, "fsr.") from None

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        return None if value is None else _budget(value, "fsr.budget")

    @field_validator("adaptive", mode="before")
    @classmethod
    def _check_adaptive(cls, value: Any) -> Any:
        if value is False:  # YAML's off
            return None
        if value is not None:
            parse_range(value, "fsr.adaptive")
        return value

    @field_validator("min_budget", "max_budget", mode="before")
    @classmethod
    def _check_bound(cls, value: Any, info: Any) -> Any:
        if value is None or value is False or value == "off":
            return None
        value = whole(value)
        if type(value) is not int or not 1 <= value <= MAX_BUDGET:
            name = f"fsr.{info.field_name}"
            raise FieldError(
                name, f"{name} must be an integer from 1 to {MAX_BUDGET:,}; got {shown(value)}"
            )
        return value

    @field_validator("feature_cache_bytes", "pixel_cache_bytes", mode="before")
    @classmethod
    def _check_bytes(cls, value: Any, info: Any) -> Any:
        if value is False or value == "off":
            return 0
        value = whole(value)
        if type(value) is not int or not 0 <= value <= 1 << 40:
            name = f"fsr.{info.field_name}"
            raise FieldError(
                name,
                f"{name} must be a number of bytes from 0 (off) to {1 << 40:,}; got {shown(value)}",
            )
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> str:
        if not isinstance(value, str):
            raise FieldError(
                "fsr.method", f"fsr.method must be the name of a method; got {shown(value)}"
            )
        known_method(value, "fsr.method")
        if value not in (served := served_methods()):
            raise FieldError(
                "fsr.method",
                f"fsr.method must be one of {', '.join(served)}; no server can give {value} its inputs",
            )
        return value

    @field_validator("text_encoder", mode="before")
    @classmethod
    def _check_encoder(cls, value: Any) -> str:
        if value is False or value == "off":
            return "none"
        name, at, revision = value.rpartition("@") if isinstance(value, str) else ("", "", "")
        if (
            not isinstance(value, str)
            or not value.strip()
            or (at and not (name.strip() and revision.strip()))
        ):
            raise FieldError(
                "fsr.text_encoder",
                f"fsr.text_encoder must be auto, a path, a name or NAME@REVISION, llm, or none; got {shown(value)}",
            )
        return value.strip()

    @field_validator("relevance_sign", mode="before")
    @classmethod
    def _check_sign(cls, value: Any) -> Any:
        if isinstance(value, bool) or str(value) not in ("auto", "1", "-1", "+1"):
            raise FieldError(
                "fsr.relevance_sign",
                f"fsr.relevance_sign must be auto, 1 or -1; got {shown(value)}",
            )
        return "auto" if value == "auto" else int(value)

    @field_validator("encoder_limit", mode="before")
    @classmethod
    def _check_encoder_limit(cls, value: Any) -> Any:
        if value not in ("unpruned", "kept"):
            raise FieldError(
                "fsr.encoder_limit",
                f"fsr.encoder_limit must be unpruned or kept; got {shown(value)}",
            )
        return value

    @field_validator("detail_budgets", mode="before")
    @classmethod
    def _check_details(cls, value: Any) -> Any:
        name = "fsr.detail_budgets"
        if value is None or value is False or value == "off":
            return {}
        if not isinstance(value, Mapping) or not set(value) <= set(DETAILS):
            allowed = f"{', '.join(DETAILS[:-1])} or {DETAILS[-1]}"
            raise FieldError(
                name,
                f'{name} must map {allowed} to a budget, as in {{"low": 64}}; got {shown(value)}',
            )
        return {detail: _budget(budget, name) for detail, budget in value.items()}

    @field_validator("model_alias", "ignore", mode="before")
    @classmethod
    def _check_flag(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, bool):
            name = f"fsr.{info.field_name}"
            raise FieldError(name, f"{name} must be true or false; got {shown(value)}")
        return value

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
        """What a request without a budget gets, without load: the server's default, else its
        maximum, else all.
        """
        if self.adaptive_range is not None:
            return self.adaptive_range[1]
        if self.budget is not None:
            return self.budget
        return self.max_budget if self.max_budget is not None else "off"

    @property
    def prunes_by_default(self) -> bool:
        """Whether some request without fsr fields is pruned."""
        return self.default_budget != "off" or any(b != "off" for b in self.detail_budgets.values())

    def check_bounds(
        self, budget: Budget, field: str = "fsr_budget", total: int | None = None
    ) -> None:
        """Refuse a budget outside the server's range. A share is judged once `total`, an image's
        tokens, is known; so is "off", of which the most that an image can have is judged before."""
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

    def _limit(self, field: str, which: str) -> str:
        """What a budget exceeds, in words: a request's exceeds the server's bound, an option's
        another option.
        """
        low, high = self.min_budget or 1, self.max_budget or MAX_BUDGET
        side, bound = ("above", high) if which == "maximum" else ("below", low)
        if field.startswith("fsr."):
            return f"{side} fsr.{which[:3]}_budget {bound}"
        allowed = f"{low} to {high}" if self.max_budget is not None else f"{low} or more"
        return f"{side} this server's {which} {bound} (allowed: {allowed})"


def _budget(value: Any, name: str) -> Budget:
    """A server's budget; YAML reads a bare `off` as false."""
    return "off" if value is False else parse_budget(value, name)


def given_settings(additional_config: Any, named: bool) -> dict[str, Any] | None:
    """This server's fsr settings as given, unjudged; None while the plugin is not active.

    `named`: whether VLLM_PLUGINS names the plugin. Errors: FieldError where
    additional_config["fsr"] is no object.
    """
    if not isinstance(additional_config, Mapping) or "fsr" not in additional_config:
        return {} if named else None
    given = additional_config["fsr"]
    if given is not None and not isinstance(given, Mapping):
        hint = (
            '; to switch the plugin off, leave it out, or give {"ignore": true}'
            if given is False
            else ""
        )
        raise FieldError(
            "additional_config",
            f'additional_config["fsr"] must be an object of options; got {type(given).__name__}{hint}',
        )
    return dict(given or {})


def ignoring(given: Mapping[str, Any] | None) -> bool:
    """Whether these settings say that the plugin is to be left aside, whatever else they hold."""
    value = (given or {}).get("ignore", False)
    if not isinstance(value, bool):
        raise FieldError("fsr.ignore", f"fsr.ignore must be true or false; got {shown(value)}")
    return value


def read_settings(hf_config: Any) -> ServerSettings | None:
    """The server's settings as put into the model config at start; None while the plugin is not
    active.
    """
    text = getattr(hf_config, SETTINGS_KEY, None)
    return None if text is None else ServerSettings.from_json(text)


def refusal(hf_config: Any) -> str | None:
    """Why no request of this server can have fields of ours; None if it can."""
    settings = read_settings(hf_config)
    if settings is None:
        return f"plugin fsr is not active; {HOW_TO_ACTIVATE}"
    return settings.unsupported
