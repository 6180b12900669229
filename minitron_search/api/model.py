"""A decoder LM with its tokenizer: a teacher that was loaded, or a student that was trimmed from one."""

import tempfile
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from minitron_search.api.shape import Shape
from minitron_search.models.device import on_device
from minitron_search.models.families import family_of
from minitron_search.models.loading import Reader, load_model, reader
from minitron_search.teachers.sources import load_tokenizer, teacher_folder


class Model:
    """A model, its tokenizer and where it came from.

    name: what it was loaded as, or what was done to it. config: its transformers configuration. tokenizer: None where
    none was given. candidates: of what `prune` returns, every shape that it tried, best first. Weights are loaded when
    they are first asked for.
    """

    def __init__(
        self,
        name: str,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        folder: Path | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        assert folder is not None or model is not None
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.candidates: pd.DataFrame | None = None
        self._folder, self._model = folder, model
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, on this process's device; one that was loaded from a folder is in float32."""
        if self._model is None:
            assert self._folder is not None
            self._model = on_device(load_model(self._folder, torch.float32)).eval()
        return self._model

    @cached_property
    def shape(self) -> Shape:
        """Its whole shape, of which `smaller` makes others."""
        return Shape.of(self.config)

    def folder(self) -> Path:
        """Return a folder that holds the model as it is stored; of one that is in memory alone a temporary copy, which
        goes with this object."""
        if self._folder is not None:
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="minitron_search-")
            self.model.save_pretrained(self._temporary.name)
        return Path(self._temporary.name)

    def reader(self) -> Reader:
        """Return a reader of its weights by name."""
        if self._folder is not None:
            return reader(self._folder)
        state = dict(self.model.named_parameters())
        return lambda name: state[name].detach().cpu()

    def save(self, folder: str | Path) -> Path:
        """Write a stock Hugging Face folder with the tokenizer. Raises ValueError for one that is not empty."""
        into = Path(folder).expanduser()
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise ValueError(f"folder: {folder} is there already; valid: a new folder")
        self.model.save_pretrained(into)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(into)
        return into

    def __repr__(self) -> str:
        return f"{self.name}: {self.config.model_type}, {self.shape!r}"

    def _repr_html_(self) -> str:
        return f"<p><b>{self.config.model_type}</b></p>{self.shape._repr_html_()}"


def load(
    model: "str | Path | PreTrainedModel | Model", tokenizer: PreTrainedTokenizerBase | str | Path | None = None
) -> Model:
    """Return a model with its tokenizer.

    `model`: the embedded teacher's name (smollm2-135m), a folder, a Hub name, or a loaded `PreTrainedModel`, which is
    used as it is. `tokenizer`: its own unless given; of a loaded model it has to be given where text is read.

    Raises ValueError for a model that there is not, that is damaged, or of a family that is not supported.
    """
    if isinstance(model, Model):
        return model
    given = load_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
    if isinstance(model, PreTrainedModel):
        family_of(model.config)
        name = getattr(model.config, "_name_or_path", "") or model.config.model_type
        return Model(name, model.config, given, model=model.eval())
    if not isinstance(model, str | Path):
        raise ValueError(f"model: {type(model).__name__} is no model; valid: a name, a folder or a PreTrainedModel")
    folder = teacher_folder(str(model))
    config = _config(folder)
    return Model(str(model), config, given or load_tokenizer(str(model)), folder=folder)


def _config(folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family_of(config)
    return config
