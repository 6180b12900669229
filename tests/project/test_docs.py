"""The documents do not rot: the commands in them parse, the keys they name are known, their links lead somewhere."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_search.ablation import definition
from minitron_search.config import keys, loading
from minitron_search.options import run_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
YAML = sorted((ROOT / "examples").glob("*.yaml"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
RUN = "python -m minitron_search.run"
KEYS = {key for key, _ in keys.keys()}
# sections of an ablation, which hold the keys of an arm under its name
OWN_SECTIONS = ("arms", "before")
SUFFIXES = ("py", "json", "jsonl", "parquet", "safetensors", "yaml", "md")  # of files, which look like keys


def fenced(document: Path, language: str) -> list[str]:
    return [block for _, of, block in FENCE.findall(document.read_text()) if of == language]


def inline(document: Path) -> list[str]:
    """Code spans in the prose, each on one line."""
    prose = FENCE.sub("", document.read_text())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def variables(script: str) -> dict[str, str]:
    """NAME=(...), NAME="..." and NAME=value of a shell script, by how they are put in."""
    lists = re.findall(r"^([A-Z]+)=\(([^)]*)\)", script, re.MULTILINE)
    plain = re.findall(r"^([A-Z]+)=(\"[^\"]*\"|[^\s(]\S*)", script, re.MULTILINE)
    found = {f'"${{{name}[@]}}"': words for name, words in lists}
    return found | {f"${name}": value.strip('"') for name, value in plain}


def commands(text: str, known: dict[str, str] | None = None) -> Iterator[list[str]]:
    """The arguments of every run that a shell script starts; `...`, for more of the same, is left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        line = re.sub(r"\s&& .*|\s&$", "", line.removeprefix("# "))
        if RUN in line:
            arguments = line.partition(RUN)[2]
            for name, value in (known or {}).items():
                arguments = arguments.replace(name, value)
            yield [word for word in shlex.split(arguments, comments=True) if word != "..."]


def every_command() -> list[tuple[str, list[str]]]:
    found = []
    for document in DOCUMENTS:
        scripts = fenced(document, "bash")
        known = {name: value for script in scripts for name, value in variables(script).items()}
        listed = [words for text in (*scripts, *inline(document)) for words in commands(text, known)]
        found += [(f"{document.relative_to(ROOT)}: {shlex.join(words)}", words) for words in listed]
    for example in YAML:
        found += [(f"{example.name}: {shlex.join(words)}", words) for words in commands(example.read_text())]
    return found


COMMANDS = every_command()


def test_the_documents_have_commands() -> None:
    """What finds them finds them in every way that they are written."""
    said = [name for name, _ in COMMANDS]
    for document in ("README.md", "docs/tutorial.md", "docs/cluster.md", "docs/ablations.md", "own_text.yaml"):
        assert any(name.startswith(document) for name in said), document
    assert any("64K" in name and "s3://" in name for name in said), "a variable was put in, over two lines"


def test_commands_parse_and_their_configurations_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations that a document shows under a name lie beside it, as a reader would have written them."""
    for file, text in shown_files().items():
        (tmp_path / file).write_text(text)
    for folder in ("search_spaces", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, words in COMMANDS:
        try:
            validate(words)
        except (ValueError, SystemExit) as error:
            wrong.append(f"{name}: {error}")
    assert not wrong


def shown_files() -> dict[str, str]:
    """The YAML of a document that begins with `# NAME.yaml`, by its name."""
    blocks = [block for document in DOCUMENTS for block in fenced(document, "yaml")]
    named = [(match[1], block) for block in blocks if (match := re.match(r"# ([\w-]+\.yaml)\b", block))]
    return dict(named)


def validate(words: list[str]) -> None:
    options, overrides = run_parser().parse_known_args(words)
    if options.config and loading.is_ablation(options.config):
        made = definition.load(options.config, overrides)
        for arm, changes in made.changes.items():
            if not made.waits(arm, changes) and not hub(made.values):
                made.config(arm)
    else:
        loading.load_config(options.config, overrides)


def hub(values: dict[str, Any]) -> bool:
    """Whether the teacher's shape, which decides an arm's, is known on the Hub alone."""
    return "/" in str(values.get("teacher", {}).get("model", ""))


@pytest.mark.parametrize(
    "words",
    [["--serch.trials", "3"], ["--search.trials", "many"], ["--config", "search_spaces/none.yaml"],
     ["--config", str(ROOT / "examples" / "compare_criteria.yaml"), "--arms.activation.search.seeds", "3"]],
)  # fmt: skip
def test_a_wrong_command_would_be_found(words: list[str]) -> None:
    with pytest.raises(ValueError, match="valid|did you mean|no file"):
        validate(words)


def test_keys_that_are_named_are_known() -> None:
    """`--search.trials 16` and `search.trials` in the prose; a section alone is a key too."""
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    for document in DOCUMENTS:
        spans = "\n".join(inline(document))
        flags = re.findall(r"--([a-z_]+\.[a-z_.]+)", document.read_text())
        plain = re.findall(rf"^((?:{'|'.join(sections)})\.[a-z_.]+)", spans, re.MULTILINE)
        named = {key.rstrip(".") for key in (*flags, *plain) if not key.startswith(OWN_SECTIONS)}
        files = {key for key in named if key.rpartition(".")[2] in SUFFIXES}
        assert named - files - KEYS - set(inner_keys()) == set(), document


def inner_keys() -> Iterator[str]:
    """Keys of sections that may be left out whole, as `space.budget.params.target`: `keys` lists those of a default."""
    for name in ("params", "non_embedding_params", "memory_bytes", "latency_ms", "tokens_per_second"):
        yield from (f"space.budget.{name}.{key}" for key in ("target", "tolerance", "batch_size", "context_length"))


def test_modules_and_scripts_that_are_run_are_there() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        for module in set(re.findall(r"python -m ((?:minitron_search|analysis|benchmarks|tests)[\w.]*\w)", text)):
            assert importlib.util.find_spec(module), (document, module)
        for script in set(re.findall(r"python ((?:examples|clusters)/\S+\.py)", text)):
            assert (ROOT / script).is_file(), (document, script)


def test_python_files_that_are_named_exist() -> None:
    """`a/b.py` lies under the root or a package; the generated tree in docs/architecture.md has bare names."""
    missing = []
    for document in DOCUMENTS:
        text = document.read_text().partition("<!-- tree: begin -->")[0]
        for path in set(re.findall(r"`([\w./-]+\.py)`", text)):
            if not any((ROOT / folder / path).is_file() for folder in ("", "minitron_search", "analysis")):
                missing.append(f"{document.relative_to(ROOT)}: {path}")
        for module in set(re.findall(r"^ *from ((?:minitron_search|analysis)[\w.]*) import", text, re.MULTILINE)):
            if importlib.util.find_spec(module) is None:
                missing.append(f"{document.relative_to(ROOT)}: {module}")
    assert not missing


def test_links_lead_somewhere() -> None:
    missing = []
    for document in (*DOCUMENTS, ROOT / "CHANGELOG.md"):
        prose = FENCE.sub("", document.read_text())
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", link)]
        for link in links:
            name, _, heading = link.partition("#")
            target = (document.parent / name).resolve() if name else document
            if not target.exists() or (heading and heading not in headings(target)):
                missing.append(f"{document.relative_to(ROOT)}: {link}")
    assert not missing


def headings(document: Path) -> set[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)\s#]+)", (ROOT / "docs" / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages - linked == set()


def test_the_site_shows_every_page_once() -> None:
    """mkdocs.yml; `make site` itself fails on a link that leads nowhere."""

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    shown = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(shown) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_yaml_that_is_shown_is_yaml() -> None:
    for document in DOCUMENTS:
        for block in fenced(document, "yaml"):
            # tags of lm-eval's tasks are none of ours
            assert isinstance(yaml.compose(block), yaml.MappingNode), document
