"""The types of configuration values: `8K`, `4.5B`, `auto`, text and paths, and the bounds of what makes sense."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field

from minitron_search.records.paths import at_home, located

Precision = Literal["float32", "bfloat16"]


IntermediateLoss = Literal["mse", "cosine"]


Strategy = Literal["ddp", "fsdp2"]


SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def as_number(value: Any) -> Any:
    """Read `4.5B`, `8K` or `1e-4` as a number; leave anything else for the field's own type to refuse."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers; valid: 16, 8K, 4.5B or 1e-4")
    if isinstance(value, int):
        return value
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d[\d_]{0,300}", text):  # exact: a float holds 53 bits
        return int(text)
    match = re.fullmatch(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:e[+-]?\d+)?)\s*([kmbt]?)", text, re.IGNORECASE)
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


def auto_or_list(value: Any) -> Any:
    """Return `auto` as it is, and anything else as `as_list` does."""
    return value if value == "auto" else as_list(value)


# A list, or `auto`, of which a message is about the one that is meant: beside `Tag("auto")` and `Tag("list")`
LIST_OR_AUTO = Discriminator(lambda value: "auto" if value == "auto" else "list")


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


def in_one_line(text: str) -> str:
    """Refuse text that is blank, or that no file name and no line of a log can hold; return anything else as it is."""
    if not text.strip():
        raise ValueError("blank text; valid: at least one character that shows")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("text with a control character; valid: text in one line")
    return text


Text = Annotated[str, Field(max_length=4096), AfterValidator(in_one_line)]


Place = Annotated[Text, AfterValidator(located)]  # a path or an address: `~` is the home folder, `S3://` is s3://


Named = Annotated[Text, AfterValidator(at_home)]  # a name, or a path: `~` is the home folder


Loss = Text  # ce, a divergence, or clm+ a divergence; losses.divergences has them, planning.checks refuses others


# The bounds are beyond whatever has been run, and within what arithmetic holds: tokens of every corpus there is,
# int64 for seeds that are counted up from, windows and batches whose product with a model's width is one too.
MOST_TOKENS, MOST_SEED, MOST_WINDOW = 10**15, 2**62, 2**24


Count = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**18)]


CountOrZero = Annotated[int, BeforeValidator(as_number), Field(ge=0, le=10**18)]


Tokens = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=MOST_TOKENS)]


TokensOrZero = Annotated[int, BeforeValidator(as_number), Field(ge=0, le=MOST_TOKENS)]


Seed = Annotated[int, BeforeValidator(as_number), Field(ge=0, le=MOST_SEED)]


Size = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**7)]  # of an axis


Layers = Annotated[int, BeforeValidator(as_number), Field(ge=0, le=10**4)]


Few = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=1_000)]  # rounds, seeds


Processes = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=100_000)]


Many = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**6)]  # trials, samples


Steps = Annotated[int, BeforeValidator(as_number), Field(ge=0, le=10**12)]


Real = Annotated[float, BeforeValidator(as_number), Field(allow_inf_nan=False)]


Positive = Annotated[float, BeforeValidator(as_number), Field(gt=0, allow_inf_nan=False)]


# Adam moves every weight by about the learning rate at each step: beyond this it leaves float32, which no check of
# divergence could tell from damage
LearningRate = Annotated[float, BeforeValidator(as_number), Field(gt=0, le=1e30, allow_inf_nan=False)]


Share = Annotated[float, BeforeValidator(as_number), Field(ge=0, lt=1, allow_inf_nan=False)]


LayersOrFraction = Annotated[int | float, BeforeValidator(as_number), Field(gt=0, le=10**4)]


AutoCount = Literal["auto"] | Count


AutoTokens = Literal["auto"] | Tokens


AutoProcesses = Literal["auto"] | Processes
