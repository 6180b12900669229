"""Structured compression of language models: search, prune, distil and prove it, on Ray.

In a notebook: `import minitron_search as ms`, then `ms.load`, `ms.corpus`, `ms.measure_importance`, `ms.sweep_depth`,
`ms.trim`, `ms.distill`, `ms.score`, `ms.prune`, `ms.search` and `ms.open_run`. Each is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from minitron_search.version import __version__ as __version__

if TYPE_CHECKING:
    from minitron_search.api import corpus as corpus
    from minitron_search.api import distill as distill
    from minitron_search.api import load as load
    from minitron_search.api import measure_importance as measure_importance
    from minitron_search.api import open_run as open_run
    from minitron_search.api import prune as prune
    from minitron_search.api import score as score
    from minitron_search.api import search as search
    from minitron_search.api import sweep_depth as sweep_depth
    from minitron_search.api import trim as trim

NOTEBOOK = (
    "corpus", "distill", "load", "measure_importance", "open_run", "prune", "score", "search", "sweep_depth", "trim",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in NOTEBOOK:
        from minitron_search import api  # torch and transformers, which whoever reads a version does not wait for

        return getattr(api, name)
    raise AttributeError(f"module 'minitron_search' has no attribute {name!r}; it has {', '.join(NOTEBOOK)}")


def __dir__() -> list[str]:
    return [*globals(), *NOTEBOOK]
