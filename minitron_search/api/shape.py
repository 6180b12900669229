"""The shape of a model or of a student, with its parameters, and its drawing beside the teacher it is cut from."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PretrainedConfig

from minitron_search.api.html import table
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.families import sizes_of, weights, whole, why_not_expressible

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, repr=False)
class Shape:
    """A shape inside the teacher that `config` describes. `architecture`: its widths, and the layers that it keeps."""

    architecture: Architecture
    config: PretrainedConfig

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Return the shape of a whole model. Raises ValueError for a family that is not supported."""
        return cls(whole(config), config)

    @cached_property
    def params(self) -> int:
        """The parameters of a model of this shape, tied embeddings once."""
        return int(parameter_count(weights(self.config), sizes_of(self.config, self.architecture)))

    @cached_property
    def non_embedding_params(self) -> int:
        """The same without input embedding and output head."""
        dims = sizes_of(self.config, self.architecture)
        return int(parameter_count(weights(self.config), dims, embeddings=False))

    def smaller(
        self,
        *,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        drop: Iterable[int] = (),
    ) -> "Shape":
        """Return the shape with these widths, without the layers in `drop` (the teacher's numbers, from 0).

        Raises ValueError for a width above the present one, a layer that is not there, and a shape that no stock
        configuration of the family says.
        """
        asked = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads,
        }  # fmt: skip
        given = {name: size for name, size in asked.items() if size is not None}
        for name, size in given.items():
            most = getattr(self.architecture, name)
            if not isinstance(size, int) or not 1 <= size <= most:
                raise ValueError(f"{name}: {size!r} is not a width inside this shape; valid: 1 to {most}")
        if "num_attention_heads" in given and "num_key_value_heads" not in given:
            given["num_key_value_heads"] = self._groups_for(given["num_attention_heads"])
        layers = self._without(tuple(drop))
        groups = given.get("num_key_value_heads", self.architecture.num_key_value_heads)
        heads = given.get("num_attention_heads", self.architecture.num_attention_heads)
        if heads % groups:
            raise ValueError(f"num_attention_heads: {heads} is no multiple of num_key_value_heads {groups}; valid: "
                             f"{groups * max(1, heads // groups)}")  # fmt: skip
        architecture = replace(self.architecture, **given, layers=layers)
        if reason := why_not_expressible(self.config, architecture):
            raise ValueError(reason)
        return Shape(architecture, self.config)

    def _groups_for(self, heads: int) -> int:
        """Return the key-value heads that go with `heads` query heads: those there are, or, where every query head has
        its own, as many."""
        own = self.architecture.num_key_value_heads == self.architecture.num_attention_heads
        return heads if own else self.architecture.num_key_value_heads

    def _without(self, drop: tuple[int, ...]) -> tuple[int, ...]:
        missing = [layer for layer in drop if layer not in self.architecture.layers]
        kept = tuple(layer for layer in self.architecture.layers if layer not in drop)
        if missing or not kept:
            told = f"layer {missing[0]} is not among those kept" if missing else "no layer is left"
            raise ValueError(f"drop: {list(drop)}: {told}; valid: some of the layers "
                             f"{self.architecture.layers[0]} to {self.architecture.layers[-1]}")  # fmt: skip
        return kept

    def __repr__(self) -> str:
        return f"{self.architecture}: {self.params:,} parameters, {self.non_embedding_params:,} without embeddings"

    def _repr_html_(self) -> str:
        teacher = Shape.of(self.config)
        rows = [
            (name, getattr(teacher.architecture, name), getattr(self.architecture, name))
            for name in (*WIDTHS, "num_hidden_layers")
        ]
        rows += [(name, getattr(teacher, name), getattr(self, name)) for name in ("params", "non_embedding_params")]
        return table(
            ("", "teacher", "this", "kept"),
            [(name, f"{of:,}", f"{own:,}", f"{own / max(of, 1):.0%}") for name, of, own in rows],
            bars=[own / max(of, 1) for _, of, own in rows],
        )
