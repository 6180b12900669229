"""What the teacher, the untrained trim and the student write after the same words."""

from analysis.page.card import Card
from analysis.run_data import RunData
from minitron_search.messages.escaping import in_html

# Key of generations.json, and what it is called
WRITERS = (
    ("text", "The text itself"),
    ("teacher", "Teacher"),
    ("untrained", "Untrained trim"),
    ("retrained", "Retrained student"),
)


def generations_card(run: RunData) -> Card:
    title = "Generations"
    read = "The likeliest words after the same prompts: what broke, and what came back. Nothing is ranked by them."
    prompts = run.generations.get("prompts")
    if not prompts:
        return Card(title, read, reason="They are written when the best student has been retrained.")
    blocks = "".join(generation_html(run, place) for place in range(len(prompts)))
    sample = f"n = {len(prompts)} prompts, the beginnings of the first validation windows; greedy decoding."
    return Card(title, read, sample, blocks)


def generation_html(run: RunData, place: int) -> str:
    """Return one prompt with what follows it in the text and what every model wrote."""
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{in_html(str(run.generations[key][place]))}</td></tr>'
        for key, name in WRITERS
        if key in run.generations
    )
    prompt = in_html(str(run.generations["prompts"][place]))
    return f'<p class="prompt">{prompt}</p><div class="scroll"><table class="words"><tbody>{rows}</tbody></table></div>'
