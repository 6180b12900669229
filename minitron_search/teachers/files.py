"""Check the files of a model against its configuration: every weight that it describes, once, of its shape.

Shapes and names are read from the headers of safetensors files, in seconds for any size. Values are read once for a
content: NaN and infinity in a weight make every number of a run NaN, or a wrong one.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from minitron_search.messages.console import say
from minitron_search.messages.failures import described
from minitron_search.models.architecture import dimension
from minitron_search.models.families import family_of, in_model, is_extra, sizes, split_name, weights
from minitron_search.models.family_tables import Family
from minitron_search.models.loading import reader, weight_files, weight_index
from minitron_search.records import cache
from minitron_search.records.cache import file_hash
from minitron_search.records.whole import safetensors_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# What from_pretrained reads beside the weights: a folder or a broken link in the place of one is read as if none were.
READ = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "model.safetensors",
    "model.safetensors.index.json",
)  # fmt: skip
LONG_PASS_BYTES = 2e9  # of a file, a shard of a large model too, from which on a line says that its values are read


class ModelError(ValueError):
    """What is wrong with the files of a model, to be told with its name before it."""


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: str
    name: str  # in the file: the model may call it otherwise
    dtype: str
    shape: tuple[int, ...]


def check_small_files(folder: Path) -> None:
    """Raise ModelError for what `from_pretrained` reads and is no regular file, or no JSON where it should be."""
    for name in READ:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not path.is_file():
            raise ModelError(f"holds a {name} that is no regular file")
        if path.suffix == ".json":
            try:
                content = json.loads(path.read_bytes(), parse_constant=_refused if name == "config.json" else None)
            except (ValueError, RecursionError) as error:
                raise ModelError(f"holds a {name} that is no JSON ({described(error)})") from error
            if not isinstance(content, dict):
                raise ModelError(f"holds a {name} that is no JSON object")
    if os.path.lexists(folder / "adapter_config.json"):
        raise ModelError("holds an adapter (adapter_config.json), which from_pretrained would put on another model; "
                         "merge_and_unload() of peft makes a model of both")  # fmt: skip


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number that a model can be made of")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the model's files by its name there, from headers alone.

    Raises ModelError for a file that is missing, cut short or no safetensors file, and for an index that does not say
    what the files hold.
    """
    try:
        files, index = weight_files(folder), weight_index(folder)
    except ValueError as error:
        raise ModelError(f"is not whole: {error}") from error
    if not files:
        raise ModelError("has no weights in safetensors files (save_pretrained writes them)")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"lacks {len(missing)} of its {len(files)} weight files, first {missing[0]}")
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise ModelError(f"holds {name} twice, in {tensors[name].file} and {path.name}")
            tensors[name] = Stored(path.name, name, tensor["dtype"], tuple(tensor["shape"]))
    if files[0].name == "model.safetensors":  # then from_pretrained reads no index
        return tensors
    for name in (*index, *tensors):
        found, listed = tensors.get(name), index.get(name)
        if (found and found.file) != listed and not is_extra(in_model(name)):
            raise ModelError(f"has an index that says {name} is in {listed or 'no file'}, and it is in "
                             f"{found.file if found else 'no file'}")  # fmt: skip
    return tensors


def check_files(folder: Path, config: PretrainedConfig) -> None:
    """Raise ModelError unless the folder's files are whole and hold exactly the weights that `config` describes.

    Of a family that is not pruned (a reference of the evaluation may be of any) the files are checked by themselves.
    """
    tensors = stored_tensors(folder)
    if getattr(config, "transformers_weights", None):
        raise ModelError("names weight files of its own (transformers_weights in config.json); model.safetensors, or "
                         "an index beside it, is what is read")  # fmt: skip
    try:
        family = family_of(config)
    except ValueError:
        return
    found: dict[str, Stored] = {}
    for name, stored in ((in_model(name), stored) for name, stored in tensors.items()):
        if name in found:
            raise ModelError(f"holds {name} under two names, in {found[name].file} and {stored.file}")
        if not is_extra(name):
            found[name] = stored
    for stored in found.values():
        if stored.dtype not in DTYPES:
            raise ModelError(f"has {stored.name} stored as {stored.dtype} ({stored.file}), which is not pruned; "
                             f"weights are {', '.join(DTYPES)}")  # fmt: skip
    if config.dtype not in (None, *DTYPES.values()):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise ModelError(f"has dtype {config.dtype} in config.json; it is one of {names}")
    _check_layers(family, config, found)
    expected = _described(config)
    # tied, and stored all the same: transformers ties the two if they are equal
    heads = [name for name, dims in family.weights.items() if dims == ("vocab", "hidden") and name not in expected]
    tied = next((name for name in heads if name in found), None)
    if tied is not None:
        expected[tied] = next(expected[name] for name in family.weights if name in expected)
    _check_names(expected, found)
    for name, shape in expected.items():
        stored = found[name]
        if stored.shape != shape:
            raise ModelError(f"has {stored.name} of shape {stored.shape} in {stored.file}, and config.json describes "
                             f"{shape}")  # fmt: skip
    if tied is not None:
        _check_tied(folder, tied, next(name for name in family.weights if name in expected))


def check_values(folder: Path) -> None:
    """Raise ModelError for a weight that has NaN or infinity in it. A content is read once, and then known."""
    for path in weight_files(folder):
        known = cache.entry("finite", file_hash(path))
        if known.exists():
            continue
        if path.stat().st_size > LONG_PASS_BYTES:
            say(f"reading the values of {path.name}, once: {path.stat().st_size / 1e9:.0f} GB")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if is_extra(in_model(name)):
                    continue
                tensor = file.get_tensor(name)
                if bad := not_finite(tensor):
                    raise ModelError(f"has NaN or infinity in {name} ({bad:,} of {tensor.numel():,} values, in "
                                     f"{path.name}), as a conversion to float16 leaves them")  # fmt: skip
        cache.replace(known, lambda into: into.write_text(""))


def not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0
    if torch.stack(tensor.aminmax()).isfinite().all():  # without a mask as large as the tensor: NaN passes through both
        return 0
    return int(tensor.isfinite().logical_not_().sum())


def _header(path: Path) -> dict[str, Any]:
    try:
        header = safetensors_header(path)
        safe_open(path, framework="pt")  # places that overlap, sizes that are not those of the shapes
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"is not whole: {path.name} {described(error)}") from error
    return header


def _described(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the model that `config` describes."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of a size of 0 is a line of its own
            dims, listed = sizes(config), weights(config)
    except Exception as error:  # of a class that is given impossible sizes: any
        raise ModelError(f"has a config.json of which no model can be made ({described(error)})") from error
    return {weight.name: tuple(dimension(dims, dim) for dim in weight.dims) for weight in listed}


def _check_layers(family: Family, config: PretrainedConfig, found: dict[str, Stored]) -> None:
    """Compare the number of layers first: a model of as many layers as config.json says might take minutes to build."""
    places = {layer for name in found if (layer := _layer(family, name)) is not None}
    if config.num_hidden_layers > len(found) or places and config.num_hidden_layers != len(places):
        raise ModelError(f"has {len(places)} layers in its weight files, and config.json says num_hidden_layers "
                         f"{config.num_hidden_layers}")  # fmt: skip


def _layer(family: Family, name: str) -> int | None:
    try:
        return split_name(family, name)[0]
    except ValueError:  # no number
        return None


def _check_names(expected: dict[str, Any], found: dict[str, Stored]) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if not missing and not unexpected:
        return
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} of the {len(expected)} weights of config.json, first {missing[0]},")
    if unexpected:
        first = found[unexpected[0]]
        faults.append(f"holds {len(unexpected)} that are not of it, first {first.name} in {first.file}")
    raise ModelError(" and ".join(faults).removesuffix(",") + _beginnings(expected, found))


def _beginnings(expected: dict[str, Any], found: dict[str, Stored]) -> str:
    """Return what all names in the files begin with before the model's own, or lack of it, as part of a message."""
    if not found:
        return ""
    first = next(iter(found))
    own = max((name for name in expected if first.endswith(name)), key=len, default="")
    before = first.removesuffix(own) if own else os.path.commonprefix(list(found)).rpartition(".")[0] + "."
    if len(before) > 1 and all(name.startswith(before) for name in found):
        return f"; every name in the files begins with {before!r}, as those of a wrapped or compiled model do"
    lacking = {name.removesuffix(first) for name in expected if name.endswith(f".{first}")}
    if lacking and not any(name.startswith(beginning) for name in found for beginning in lacking):
        return f"; no name in the files begins with {min(lacking)!r}, as where a model is saved without its head"
    return ""


def _check_tied(folder: Path, head: str, embedding: str) -> None:
    """Compare a head with the embedding that it is tied to: the one case in which values say what the model is."""
    read = reader(folder)
    if not torch.equal(read(head), read(embedding)):
        raise ModelError(f"has a {head} of its own, other than {embedding}, and config.json says that they are one "
                         "(tie_word_embeddings true); it is false, or the file has no such head")  # fmt: skip
