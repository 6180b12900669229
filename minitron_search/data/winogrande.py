"""Load Winogrande examples: the embedded ones, those of a file, or those of the Hub."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from minitron_search.data.text_sources import half_character

EMBEDDED = Path(__file__).parent / "embedded" / "winogrande.jsonl"
MOST_BYTES = 2**30  # of a file of questions: it is read at once
HUB = "allenai/winogrande"
FEWSHOT_SEED = 1234  # lm-eval's default `fewshot_random_seed`


@dataclass(frozen=True)
class Example:
    """One question: `sentence` holds one `_`, which `answer` (1 or 2) says how to fill."""

    sentence: str
    option1: str
    option2: str
    answer: int

    @property
    def beginnings(self) -> tuple[str, str]:
        """Return the text before the blank followed by either option."""
        before = self.sentence[: self.sentence.index("_")]
        return before + self.option1, before + self.option2

    @property
    def ending(self) -> str:
        """Return the text after the blank: what is scored."""
        return self.sentence[self.sentence.index("_") + 1 :].strip()


def load_examples(source: str, limit: int | None = None) -> list[Example]:
    """Return the first `limit` examples (all when None) of `source`, in order.

    `source` is `embedded`, a `.jsonl` file of `{"sentence", "option1", "option2", "answer"}` records, or
    `allenai/winogrande` (the validation split of winogrande_xl). Raises ValueError for a source that cannot
    be read, for a record that is not a Winogrande question (naming file and line), and for a `limit` outside
    1..number of examples.
    """
    if source == HUB:
        examples = _from_hub()
    elif source == "embedded":
        examples = _from_file(EMBEDDED)
    elif source.endswith(".jsonl"):
        examples = _from_file(Path(source))
    else:
        raise ValueError(f"winogrande.source: {source!r} is not valid; valid: embedded, a .jsonl file, {HUB}")
    if not examples:
        raise ValueError(f"winogrande.source: {source} holds no examples; valid: a file with at least one")
    if limit is not None and not 1 <= limit <= len(examples):
        raise ValueError(
            f"winogrande.limit: {limit} is outside 1..{len(examples)}, the number of examples in {source}; "
            "valid: null, for all"
        )
    return examples[:limit]


def _from_file(path: Path) -> list[Example]:
    if path.exists() and not path.is_file():
        raise ValueError(f"winogrande.source: {path} is not a regular file; valid: embedded, or a .jsonl file")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.jsonl")], cutoff=0.4)
        hint = f"near it: {', '.join(near)}" if near else "valid: embedded, or a file that exists"
        raise ValueError(f"winogrande.source: no file {path}; {hint}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"winogrande.source: {path} has {size:,} bytes; valid: at most {MOST_BYTES:,}")
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            examples.append(_parse(record, where))
    return examples


def _from_hub() -> list[Example]:
    try:
        import datasets  # here, because it takes a second to import and only this source needs it

        records = datasets.load_dataset(HUB, "winogrande_xl", split="validation")
    except Exception as error:  # the Hub's client fails in a dozen types; the cause is in the message
        raise ValueError(
            f"winogrande.source: {HUB} could not be loaded ({type(error).__name__}: {error}); without the "
            "Hugging Face Hub, use embedded or a .jsonl file"
        ) from error
    return [_parse(record, f"{HUB} validation, row {row}") for row, record in enumerate(records)]


def _parse(record: object, where: str) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not an object with sentence, option1, option2 and answer")
    for field in ("sentence", "option1", "option2", "answer"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{where}: field {field!r} is missing or not a string")
        if half := half_character(record[field]):
            raise ValueError(f"{where}: field {field!r}: {half}")
    if record["answer"] not in ("1", "2"):  # Winogrande's test split has an empty answer
        raise ValueError(f'{where}: answer is {record["answer"]!r}; valid: "1" or "2" (a test split has none)')
    for field in ("option1", "option2"):
        if not record[field].strip():
            raise ValueError(f"{where}: {field} is blank")
    blanks = record["sentence"].count("_")
    if blanks != 1:
        raise ValueError(f"{where}: sentence has {blanks} `_`; valid: exactly one, where the option goes")
    if record["option1"].strip() == record["option2"].strip():
        raise ValueError(f"{where}: option1 and option2 are both {record['option1']!r}; valid: two that differ")
    example = Example(record["sentence"], record["option1"], record["option2"], int(record["answer"]))
    if not example.ending:
        raise ValueError(f"{where}: sentence has nothing after its `_`, so there is nothing to score")
    return example
