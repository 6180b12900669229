"""The notebook's functions: `import minitron_search as ms`. Each works without Ray but `search`, which distributes.

What is asked for is imported then: reading a run needs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron_search.api.depth import Sweep as Sweep
    from minitron_search.api.depth import sweep_depth as sweep_depth
    from minitron_search.api.model import Model as Model
    from minitron_search.api.model import load as load
    from minitron_search.api.one_call import prune as prune
    from minitron_search.api.pruning import measure_importance as measure_importance
    from minitron_search.api.pruning import trim as trim
    from minitron_search.api.runs import Run as Run
    from minitron_search.api.runs import open_run as open_run
    from minitron_search.api.runs import search as search
    from minitron_search.api.scores import Scores as Scores
    from minitron_search.api.scores import score as score
    from minitron_search.api.shape import Shape as Shape
    from minitron_search.api.text import corpus as corpus
    from minitron_search.api.training import Distillation as Distillation
    from minitron_search.api.training import distill as distill

# name -> the file that has it
PLACES = {
    "Distillation": "training", "Model": "model", "Run": "runs", "Scores": "scores", "Shape": "shape", "Sweep": "depth",
    "corpus": "text", "distill": "training", "load": "model", "measure_importance": "pruning", "open_run": "runs",
    "prune": "one_call", "score": "scores", "search": "runs", "sweep_depth": "depth", "trim": "pruning",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(PLACES))}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PLACES]
