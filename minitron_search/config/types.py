"""The types of configuration values: `8K`, `4.5B`, `auto`, and the names that several sections share."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

Loss = str  # ce, a divergence, or clm+ a divergence; losses.divergences has them, planning.checks refuses others


Precision = Literal["float32", "bfloat16"]


IntermediateLoss = Literal["mse", "cosine"]


Strategy = Literal["ddp", "fsdp2"]


SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def as_number(value: Any) -> Any:
    """Read `4.5B`, `8K` or `1e-4` as a number; leave anything else for the field's own type to refuse."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers; valid: 16, 8K, 4.5B or 1e-4")
    match = re.fullmatch(r"\s*([+-]?[\d_]*\.?\d+(?:e[+-]?\d+)?)\s*([kmbt]?)\s*", str(value), re.IGNORECASE)
    if not match:
        return value
    number = float(match[1].replace("_", "")) * SUFFIXES.get(match[2].lower(), 1)
    if math.isinf(number):
        return value
    # 1.1M * 10**6 is 1100000.0000000001 in floating point
    return round(number) if abs(number - round(number)) < 1e-6 * max(1, abs(number)) and abs(number) >= 1 else number


def as_list(value: Any) -> Any:
    """Read `a,b` as the list [a, b], and a single value as a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


def one_or_several(value: Any) -> Any:
    """Read `a,b` as the list [a, b], and a list of one as its only value."""
    listed = as_list(value) if value and not isinstance(value, Mapping) else value
    return listed[0] if isinstance(listed, list | tuple) and len(listed) == 1 else listed


def same_in_every_layer(value: Any) -> Any:
    """Refuse a list of sizes for every layer; return anything else as it is."""
    if isinstance(value, list | tuple) and any(isinstance(item, list | tuple) for item in value):
        raise ValueError("an axis takes one size for all layers, as a stock configuration of these families does, not "
                         "a size for every layer; valid: choices: [768, 1024]")  # fmt: skip
    return value


def off_for_false(value: Any) -> Any:
    """Return `off` for false, which is what YAML 1.1 makes of it."""
    return "off" if value is False else value


Count = Annotated[int, BeforeValidator(as_number), Field(ge=1)]


CountOrZero = Annotated[int, BeforeValidator(as_number), Field(ge=0)]


Real = Annotated[float, BeforeValidator(as_number), Field(allow_inf_nan=False)]


Positive = Annotated[float, BeforeValidator(as_number), Field(gt=0, allow_inf_nan=False)]


Share = Annotated[float, BeforeValidator(as_number), Field(ge=0, lt=1)]


LayersOrFraction = Annotated[int | float, BeforeValidator(as_number), Field(gt=0)]


AutoCount = Literal["auto"] | Count
