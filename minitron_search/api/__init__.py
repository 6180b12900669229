"""The notebook's functions: `import minitron_search as ms`. Each works without Ray but `search`, which distributes."""

from minitron_search.api.depth import Sweep, sweep_depth
from minitron_search.api.model import Model, load
from minitron_search.api.one_call import prune
from minitron_search.api.pruning import measure_importance, trim
from minitron_search.api.runs import Run, open_run, search
from minitron_search.api.scores import Scores, score
from minitron_search.api.shape import Shape
from minitron_search.api.text import corpus
from minitron_search.api.training import Distillation, distill
from minitron_search.data.corpus import Corpus
from minitron_search.importance.importance import Importance

__all__ = [
    "Corpus", "Distillation", "Importance", "Model", "Run", "Scores", "Shape", "Sweep", "corpus",
    "distill", "load", "measure_importance", "open_run", "prune", "score", "search", "sweep_depth", "trim",
]  # fmt: skip
